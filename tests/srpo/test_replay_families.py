"""Routing replay on a tiny real model of every family in `moe_families`, and the table of what was verified.

The spy reads the expert ids where the experts get them, so nothing here trusts our own record. The table in
`recipes/moe_families.md` is compared with these results; `python tests/srpo/test_replay_families.py` writes it anew.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from moe_families import (
    EXPERTS,
    FAMILIES,
    TOP_K,
    VOCABULARY,
    build,
    missing,
    perturb,
    right_aligned,
    sampled,
    spy,
)  # fmt: skip
from torch import Tensor

from srpo.replay.expert_table import flip_statistics, pad_routes
from srpo.replay.families import find_routers
from srpo.replay.replay import RoutingReplay

TABLE = Path(__file__).resolve().parents[2] / "recipes" / "moe_families.md"


class Rollout(NamedTuple):
    sequences: list[Tensor]  # real tokens of each
    truth: list[Tensor]  # [T - 1, L, k], what the spy saw the experts run
    routes: list[Tensor]  # [T, L, k], what was recorded


def rollout(model: Any, replay: RoutingReplay) -> Rollout:
    """Sampled by our own generator, from prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    width, lengths = 7, (4, 7, 6)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    layers = replay.spec.layers
    sequences, routes, _, seen = sampled(model, replay, prompts, 6, watched=spy(model, layers))
    steps = [torch.stack(seen[i : i + len(layers)], dim=1) for i in range(0, len(seen), len(layers))]
    run = torch.cat([step.view(3, -1, len(layers), replay.spec.top_k) for step in steps], dim=1)  # [B, S - 1, L, k]
    truth = [row[width - n :] for row, n in zip(run, lengths, strict=True)]  # prompts are padded on the left
    return Rollout(sequences, truth, routes)


class Result(NamedTuple):
    exact: bool
    exact_perturbed: bool
    flips: float
    gradients: bool
    logits: float


@cache
def verify(family: str) -> Result:
    """Sample -> train in another layout, with the same weights and with all weights perturbed."""
    model = build(family)
    replay = RoutingReplay(model)
    rolled = rollout(model, replay)
    order = [2, 0, 1]
    ids, mask = right_aligned([rolled.sequences[i] for i in order], pad=3)  # sampling never had that width
    routes = pad_routes([rolled.routes[i] for i in order], mask)
    fed = mask.clone()
    fed[:, -1] = 0  # the last token was never fed

    def selections(measure: bool = False) -> tuple[Tensor, Tensor]:
        with spy(model, replay.spec.layers) as seen, replay.replay(routes, measure):
            logits = model(input_ids=ids, attention_mask=mask).logits
        return torch.stack(seen, dim=1).view(*ids.shape, -1, replay.spec.top_k)[fed.bool()], logits

    truth = torch.cat([rolled.truth[i] for i in order])
    with torch.no_grad():
        first, logits = selections()
        native = model(input_ids=ids, attention_mask=mask).logits
    perturb(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    second, live = selections(measure=True)
    flips = flip_statistics(replay.divergence(), replay.spec.top_k, fed)["flip_rate"].item()
    live[mask.bool()].log_softmax(-1)[:, 5].sum().backward()
    gates = [max(modules[0].parameters(), key=Tensor.numel) for modules in find_routers(model)[1]]
    return Result(
        torch.equal(first, truth),
        torch.equal(second, truth),
        flips,
        all(g.grad is not None and bool(g.grad.abs().sum() > 0) for g in gates),
        (logits - native)[mask.bool()].abs().max().item(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_then_train_runs_the_same_experts(family: str) -> None:
    if why := missing(family):
        pytest.skip(why)
    result = verify(family)
    assert result.exact, "replay after sampling, same weights"
    assert result.exact_perturbed, "replay after every weight moved"
    assert result.flips > 0.05, "the perturbation must change native choices, or exactness says nothing"
    assert result.gradients, "some router got no gradient under replay"
    # In float32, sampling with a cache and training forward differ in the last bits only, so routes agree, and
    # replaying what the model would choose anyway must not change its results.
    assert result.logits < 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "longcat_flash", "jamba", "deepseek_v4"])
def test_spec(family: str) -> None:
    expected = {
        "qwen3_moe": ((0, 1), 2),
        "deepseek_v2": ((1, 2), 3),
        "longcat_flash": ((0, 1), 4),
        "jamba": ((1, 3), 4),
        "deepseek_v4": ((1, 2), 3),
    }
    if why := missing(family):
        pytest.skip(why)
    spec = find_routers(build(family))[2]
    assert (spec.layers, spec.num_layers) == expected[family]
    assert (spec.top_k, spec.num_experts) == (TOP_K, EXPERTS + 2 * (family == "longcat_flash"))  # two zero experts


def table() -> str:
    lines = [
        "# MoE families that routing replay is verified on",
        "",
        f"Written by `python tests/srpo/test_replay_families.py` with transformers {transformers.__version__};",
        "the test of the same name fails when it no longer holds. Per family, a tiny random model of the real class:",
        "sampled by our generator from left-padded prompts, then scored in another order and padding. *Exact*: the",
        "experts get bit-identical ids, seen by a spy at their input; *perturbed*: also after noise on every weight,",
        "which would have changed the share of choices in the next column. *Gate gradient*: non-zero in every layer",
        "under replay.",
        "",
        "| family | class | exact | perturbed | would have changed | gate gradient |",
        "|---|---|---|---|--:|---|",
    ]
    for family, (kind, _) in FAMILIES.items():
        if missing(family):
            continue
        one = verify(family)
        marks = ["yes" if good else "NO" for good in (one.exact, one.exact_perturbed, one.gradients)]
        lines.append(f"| {family} | {kind} | {marks[0]} | {marks[1]} | {100 * one.flips:.0f} % | {marks[2]} |")
    lines += [
        "",
        "A family that is not here may work too; one that cannot be intercepted is an error and never runs silently:",
        "Phimoe raises at its first recorded or replayed forward, Dbrx and Doge when replay is installed. An older",
        "transformers lacks some of these families. To verify another one, give it a line in",
        "`tests/support/moe_families.py` and write this file again.",
    ]
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> list[list[str]]:
    """Cells, without the share of changed choices: it may move by a rounding on another processor."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row[:4] + row[5:] for row in cells]


def test_the_table_is_what_these_tests_found() -> None:
    lacking = {family for family in FAMILIES if missing(family)}
    written = [row for row in rows_of(TABLE.read_text()) if row[0] not in lacking]
    assert written == rows_of(table()), f"run: python tests/{Path(__file__).name}"


if __name__ == "__main__":
    if absent := [why for family in FAMILIES if (why := missing(family))]:
        sys.exit("the table is written where every family can be built: " + "; ".join(absent))
    sys.stdout.write(table())
    TABLE.write_text(table())
