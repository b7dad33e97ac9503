"""Routes as data: validation, alignment, ragged storage and flip statistics, worked by hand."""

from __future__ import annotations

import pytest
import torch
from moe_families import build
from torch import Tensor

from srpo.replay.expert_table import (
    RouterSpec,
    RowRecorder,
    append_routes,
    check_routes,
    flip_statistics,
    pad_routes,
)
from srpo.replay.replay import RoutingReplay
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request

SPEC = RouterSpec(layers=(1, 3), num_layers=4, top_k=2, num_experts=8)


def table(*shape: int) -> Tensor:
    """Valid routes that differ from row to row: experts (i, i + 1) modulo 8."""
    first = torch.arange(torch.tensor(shape).prod().item()).view(shape) % 7
    return torch.stack([first, first + 1], dim=-1).to(torch.int16)


def test_valid_routes_pass() -> None:
    routes = table(3, 5, 2)
    routes[0, 2] = -1
    check_routes(routes, SPEC)
    check_routes(routes.long(), SPEC)
    check_routes(routes[:0], SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.fill_(0), r"30 of 30 rows .* names an expert twice"),
        (lambda r: r[1, 4, 1].fill_(5), r"1 of 30 rows .* row \[1, 4, 1\] .* names an expert twice .*: \[5, 5\]"),
        (lambda r: r[0, 0, 0, 1].fill_(8), r"row \[0, 0, 0\] .* outside 0..7"),
        (lambda r: r[0, 0, 0, 1].fill_(-2), "outside 0..7"),
        (lambda r: r[2, 0, 1, 0].fill_(-1), r"row \[2, 0, 1\] .* is -1 in part"),
    ],
)
def test_wrong_routes_are_named(change, message: str) -> None:
    routes = table(3, 5, 2)
    change(routes)
    with pytest.raises(ValueError, match=message):
        check_routes(routes, SPEC)


def test_one_expert_per_token_has_no_duplicates_to_see() -> None:
    spec = RouterSpec((0, 1), 2, 1, 8)
    routes = torch.zeros(4, 2, 1, dtype=torch.int16)
    with pytest.raises(ValueError, match="every route is expert 0"):
        check_routes(routes, spec)
    routes[3, 1] = 2
    check_routes(routes, spec)


def test_ids_of_256_experts_and_more_need_more_than_a_byte() -> None:
    spec = RouterSpec((0,), 1, 2, 512)
    routes = torch.tensor([[[255, 511]], [[-1, -1]]], dtype=torch.int16)
    check_routes(routes, spec)
    with pytest.raises(ValueError, match="8 bits are too few"):
        check_routes(torch.tensor([[[255, 3]]], dtype=torch.uint8), RouterSpec((0,), 1, 2, 256))


def test_padding_round_trip() -> None:
    rows = [table(2, 2), table(5, 2), table(1, 2)]
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]])  # pads on both sides and inside
    routes = pad_routes(rows, mask)
    assert (routes[mask == 0] == -1).all() and routes.dtype == torch.int16
    assert torch.equal(routes[1, 3], rows[1][2])
    assert all(torch.equal(a[m.bool()], b) for a, m, b in zip(routes, mask, rows, strict=True))
    with pytest.raises(ValueError, match=r"\(sequence, rows\) \[\(2, 2\)\]"):
        pad_routes([*rows[:2], table(2, 2)], mask)


def test_routes_of_a_conversation_only_grow() -> None:
    held, new = table(4, 2), table(3, 2)
    assert torch.equal(append_routes(held, new, 4), torch.cat([held, new]))
    for start in (3, 5):
        with pytest.raises(ValueError, match=f"start at token {start}, but 4 rows are held"):
            append_routes(held, new, start)


def test_flip_statistics_by_hand() -> None:
    """One sequence of four tokens, two layers, k = 2; the last token does not count, the third is native."""
    lost = torch.tensor([[[0, 0], [1, 2], [-1, -1], [2, 2]]], dtype=torch.int16)
    mask = torch.tensor([[1, 1, 1, 0]])
    found = flip_statistics(lost, 2, mask)
    assert found["flip_rate"] == 2 / 4  # of (token, layer): both of the second token
    assert found["slot_flip"] == 3 / 8  # 1 + 2 of 2 tokens x 2 layers x 2 slots
    assert found["token_any_layer"] == 1 / 2
    assert found["per_layer"].tolist() == [1 / 2, 1 / 2]
    assert found["fallback_fraction"] == pytest.approx(1 / 3)  # one of three tokens, in both layers
    assert flip_statistics(lost, 2)["flip_rate"] == 4 / 6


class Words:
    """As much of a tokenizer as our decoding loop needs without stop strings."""

    pad_token_id, decode = 0, str


def test_rows_of_our_own_decoding_are_those_of_a_forward() -> None:
    """Two turns, prompts and a second context that rows share, rows that end early, observations between the turns."""
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    context = {row: [5, 6, 7, 8] if row < 3 else [9, 10, 11, 12, 13, 14] for row in range(5)}
    with replay.record_rows() as recorder:
        generator = TransformersGenerator(model, Words(), Sampling(), eos_ids=[2], recorder=recorder)
        for turn, limits in enumerate(((5, 2, 7, 3, 3), (4, 6, 0, 1, 2))):
            requests = [
                Request(row, tuple(context[row]), f"{min(row, 3)}-{turn}", limits[row])
                for row in range(5)
                if limits[row]
            ]
            for request, sample in zip(requests, generator.generate(requests), strict=True):
                context[request.row] += [*sample.ids, 20 + min(request.row, 3)] if turn == 0 else sample.ids
    assert context[3] == context[4][: len(context[3])]  # the same seeds: they shared the second turn's prefill too
    lengths = {row: len(context[row]) for row in (3, 0, 2, 1, 4)}
    for (row, tokens), routes in zip(lengths.items(), recorder.rows(lengths), strict=True):
        with torch.no_grad(), replay.record_once():
            model(input_ids=torch.tensor([context[row]]))
        whole = replay.recorded()[0]
        unfed = 1 if row != 2 else 2  # row 2 had one turn: neither its last token nor its observation was fed
        assert routes.shape == whole.shape and (routes[tokens - unfed :] == -1).all()
        assert torch.equal(routes[: tokens - unfed], whole[: tokens - unfed])


def recorder_of(*steps: tuple[list[tuple[int, ...]], list[list[int]]]) -> RowRecorder:
    recorder = RowRecorder()
    for rows, positions in steps:
        place = torch.tensor(positions)
        recorder.put(table(*place.shape, 2))
        recorder(rows, place)
    return recorder


def test_the_first_feed_of_a_position_is_kept() -> None:
    recorder = RowRecorder()
    first, again = table(1, 3, 2), (table(1, 4, 2) + 1) % 8
    for routes, place in ((first, [[0, 1, 2]]), (again, [[0, 1, 2, 3]])):  # a context that was prefilled anew
        recorder.put(routes)
        recorder([(7,)], torch.tensor(place))
    (rows,) = recorder.rows({7: 5})
    assert torch.equal(rows[:3], first[0]) and torch.equal(rows[3], again[0, 3]) and (rows[4] == -1).all()


def test_a_recorder_notices_what_is_missing() -> None:
    recorder = recorder_of(([(0,), (1,)], [[-1, 0, 1], [0, 1, 2]]), ([(1,)], [[4]]))  # position 3 of row 1 is missing
    assert len(recorder.rows({0: 2})[0]) == 2
    with pytest.raises(ValueError, match="sequence 1 has 6 tokens"):
        recorder.rows({1: 6})
    with pytest.raises(ValueError, match="sequence 0 has 1 tokens"):
        recorder.rows({0: 1})
    with pytest.raises(ValueError, match="sequence 2 was never fed"):
        recorder.rows({2: 3})
    with pytest.raises(RuntimeError, match="no forward"):
        recorder([(0,)], torch.tensor([[5]]))
    recorder.put(table(1, 2, 2))
    with pytest.raises(ValueError, match="were reported"):
        recorder([(0,)], torch.tensor([[5]]))
    with pytest.raises(RuntimeError, match="no forward was reported"):
        RowRecorder().rows({0: 1})
