"""Micro-batches: groups whole, like lengths together, no column too many, and the step of TRL's own split."""

import json
import random
import subprocess
import sys
from itertools import chain, groupby, permutations, product
from pathlib import Path

import pytest
import torch
from core_helpers import config, dataset, digest, model, script, trainer
from micro_batch_cases import CASES, SHARED
from replay_cases import moe
from trl.trainer import utils

from srpo.trainer.balance import dealt, time_of
from srpo.trainer.loss import sequences
from srpo.trainer.micro_batches import arrange, cut, depends_on_split, joined, laid, micro_batches

# --------------------------------------------------------------------------------------------------- which rows where


def arranged(prompts, completions, groups, size, together, *how, **named):
    steps = laid(groups, size * together)
    return [part for step in steps for part in arrange(prompts, completions, step, size, *how, **named)]


def test_by_hand():
    """Three groups of two in three micro-batches of two: the longest row of each decides."""
    prompts, completions = [4, 4, 5, 5, 2, 2], [1, 2, 1, 7, 9, 0]  # longest: 6, 12, 11
    assert arranged(prompts, completions, [0, 0, 1, 1, 2, 2], size=2, together=3) == [[2, 3], [4, 5], [0, 1]]


def test_by_hand_where_siblings_share_their_prompt():
    """A group is one row then, of its prompt and all completions: 4 + 3, 5 + 8, 2 + 12."""
    prompts, completions = [4, 4, 5, 5, 2, 2], [1, 2, 1, 7, 9, 3]
    found = arranged(prompts, completions, [0, 0, 1, 1, 2, 2], size=2, together=3, shared=True)
    assert found == [[4, 5], [2, 3], [0, 1]]


def test_a_group_larger_than_a_micro_batch_by_hand():
    """Its longest completions come first; the parts of both groups then by length: 9, 8 | 5, 3 | 4, 4 | 1, 0."""
    prompts, completions = [1] * 8, [3, 9, 5, 8, 4, 0, 1, 4]
    found = arranged(prompts, completions, [0] * 4 + [1] * 4, size=2, together=4)
    assert found == [[1, 3], [2, 0], [4, 7], [6, 5]]


def test_like_lengths_together_make_the_least_padded_work():
    """No other way to fill the micro-batches is shorter in total, nor in its k-th longest, for any k."""
    lengths = [3, 9, 4, 1, 8, 8]
    found = arranged([1] * 6, lengths, list(range(6)), size=2, together=3)
    ours = sorted((max(lengths[row] for row in part) for part in found), reverse=True)
    for order in permutations(range(6)):
        parts = [order[i : i + 2] for i in (0, 2, 4)]
        theirs = sorted((max(lengths[row] for row in part) for part in parts), reverse=True)
        assert all(a <= b for a, b in zip(ours, theirs, strict=True))


def whole(part, groups):
    """(group, rows) of each run of siblings in a micro-batch."""
    return [(group, len(list(rows))) for group, rows in groupby(part, key=groups.__getitem__)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_are_whole(group, size, ranks, by_length, shared):
    torch.manual_seed(group * size)
    for rank in range(ranks):
        rows = 16
        groups = [(rank * rows + row) // group for row in range(rows)]
        prompts = [digest(g) % 30 + 1 for g in groups]
        completions = [digest((rank, row)) % 20 for row in range(rows)]
        for together in (t for t in (1, 2, 4, 8, 16) if t * size <= rows):
            found = arranged(prompts, completions, groups, size, together, by_length, shared)
            assert sorted(row for part in found for row in part) == list(range(rows))
            for part in found:
                assert len(part) == size
                assert all(count == min(group, size) for _, count in whole(part, groups))
            # A group that fills several micro-batches stays within one step, if that has room for it.
            for start in range(0, len(found), together):
                step = [groups[row] for part in found[start : start + together] for row in part]
                assert all(step.count(g) == min(group, together * size) for g in set(step))


def test_a_group_that_does_not_fit_is_torn_once():
    """Groups of four in micro-batches of six: two of three stay whole, whatever their order."""
    groups = [row // 4 for row in range(12)]
    for seed in range(6):
        torch.manual_seed(seed)
        found = arranged([1] * 12, [digest(row) % 9 for row in range(12)], groups, size=6, together=2)
        runs = [run for part in found for run in whole(part, groups)]
        assert sorted(count for _, count in runs) == [2, 2, 4, 4]


def test_steps_get_groups_by_chance_and_not_by_length():
    """Each of four groups comes first about as often as another, and the orders are those of the random state."""
    groups, lengths = [row // 2 for row in range(8)], list(range(8))
    torch.manual_seed(0)
    first = [groups[arranged([1] * 8, lengths, groups, size=2, together=1)[0][0]] for _ in range(400)]
    assert all(60 < first.count(group) < 140 for group in range(4))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"loss_type": "grpo"}, False),
        ({"loss_type": "dr_grpo"}, False),
        ({"loss_type": "bnpo"}, True),
        ({"entropy_coef": 0.1}, True),
        ({"use_adaptive_entropy": True, "entropy_target": 0.5}, True),
        ({"top_entropy_quantile": 0.5}, True),
    ],
)
def test_what_a_micro_batch_decides_on_its_own_is_left_to_chance(tmp_path, settings, expected):
    assert depends_on_split(config(tmp_path, objective="grpo", **settings)) is expected


# ---------------------------------------------------------------------------------------------------------- which rank


def test_groups_of_two_ranks_by_hand():
    """9 and 8 at the same time, then 3 and 2; who has 9 gets 2. Before: 9 and 3, then 8 and 2, which take 17."""
    assert time_of([[9, 8], [3, 2]], [[0, 0], [1, 1]]) == 17 + 17
    assert dealt([[9, 8], [3, 2]]) == [[0, 1], [1, 0]]
    assert time_of([[9, 8], [3, 2]], [[0, 1], [1, 0]]) == 12 + 11


def test_groups_that_save_nothing_stay():
    assert dealt([[5, 5, 5], [5, 5, 5]]) == [[0, 0, 0], [1, 1, 1]]
    assert dealt([[100, 52], [51, 50]]) == [[0, 0], [1, 1]], "3 of 304"
    assert dealt([[7]]) == [[0]]


def rounds(costs, to):
    """Time of ranks that meet after each of their groups, longest first."""
    groups = sorted(zip(to, chain(*costs), strict=True), key=lambda group: -group[1])
    return sum(map(max, *([cost for rank, cost in groups if rank == own] for own in range(len(costs)))))


def test_no_other_way_to_deal_takes_less_time_where_ranks_meet_after_each_group():
    draw, moved = random.Random(0), 0
    for ranks, each in ((2, 2), (2, 3), (3, 2)):
        for _ in range(20):
            costs = [[draw.randint(1, 30) for _ in range(each)] for _ in range(ranks)]
            to = dealt(costs)
            assert sorted(one for own in to for one in own) == sorted(list(range(ranks)) * each)
            ways = set(permutations([one for own in to for one in own]))
            stay = sorted(chain(*to)) == list(chain(*to))
            assert stay or rounds(costs, chain(*to)) == min(rounds(costs, way) for way in ways)
            moved += not stay
    assert moved > 20


# ------------------------------------------------------------------------------------------------------------ columns


def batch_of(folder, network=None, **changes):
    """A trainer, and a scored generation batch of it: 4 groups of 4, prompts and completions of several lengths."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_iterations": 2}
    made = trainer(config(folder, **{**settings, **changes}), network, rollout_func=ragged)
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    return made, made._generate_and_score_completions([row for row in dataset().select(range(4)) for _ in range(4)])


def ragged(prompts, made):
    texts = [prompt[-1]["content"] for prompt in prompts]
    ids = made._tokenize_prompts(prompts)[0]
    done = [script(text, i % 4)[: 2 + digest(text) % 7] for i, text in enumerate(texts)]
    answer = {
        "prompt_ids": [[5] * (digest(text) % 5) + row for text, row in zip(texts, ids, strict=True)],
        "completion_ids": done,
        "logprobs": [[-1.0] * len(row) for row in done],
        "env_mask": [[int(i not in (1, 9))] * len(row) for i, row in enumerate(done)],
    }
    if made.args.routing_replay == "R3":
        n = [len(p) + len(c) for p, c in zip(answer["prompt_ids"], done, strict=True)]
        answer["expert_ids"] = [
            (torch.randint(0, 8, (tokens, 2, 1)) + torch.arange(2)).fmod(8).tolist() for tokens in n
        ]
    return answer


OBJECTIVES = {
    "grpo": {"objective": "grpo", "beta": 0.1},
    "minirl": {"objective": "grpo", "loss_type": "minirl", "num_iterations": 1},
    "sdpo": {"objective": "sdpo"},
    "srpo": {"objective": "srpo"},
    "srpo_sampled": {"objective": "srpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "bopo": {"objective": "bopo", "advantage_baseline": "none", "advantage_scale": "group"},
    **{f"trl_{name}": {"objective": "grpo", "loss_type": name} for name in ("grpo", "dr_grpo", "cispo", "dapo")},
}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("case", ["grpo", "minirl", "sdpo", "srpo", "srpo_sampled", "replay"])
def test_columns_that_no_row_needs_are_gone_everywhere(tmp_path, case, multiple):
    """Every tensor of every objective's batch, and each still has the values of its own row and token."""
    padded = {"pad_to_multiple_of": multiple} if multiple > 1 else {}
    if case == "replay":
        made, batch = batch_of(tmp_path, moe(), objective="grpo", routing_replay="R3", **padded)
        assert batch["expert_ids"].shape[1] == batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    else:
        made, batch = batch_of(tmp_path, **OBJECTIVES[case], **padded)
    batch["row"] = torch.arange(16)
    batch["choices"] = torch.stack([batch["completion_ids"], batch["completion_ids"] + 1], dim=2)
    narrower = 0
    halves = [cut(batch, rows, multiple) for rows in ([3, 14, 0, 7, 9], list(range(10, 16)))]
    for part in (*micro_batches(batch, made.args, made.accelerator, False, False), *halves, joined(halves)):
        rows = part["row"].tolist()
        masks = part["prompt_mask"], part["completion_mask"]
        for mask in masks:
            longest = int(mask.sum(dim=1).max())
            assert mask.size(1) == -(-longest // multiple) * multiple
        narrower += masks[0].size(1) < batch["prompt_mask"].size(1)
        narrower += masks[1].size(1) < batch["completion_mask"].size(1)
        for name, value in part.items():
            if isinstance(value, list):
                assert all(a is batch[name][row] for a, row in zip(value, rows, strict=True))
            elif value.ndim == 0:
                assert value == batch[name]
        for i, row in enumerate(rows):
            real = {name: part[f"{name}_mask"][i].bool() for name in ("prompt", "completion")}
            was = {name: batch[f"{name}_mask"][row].bool() for name in ("prompt", "completion")}
            both, all_of_it = (torch.cat([m["prompt"], m["completion"]]) for m in (real, was))
            for name, value in part.items():
                if not isinstance(value, torch.Tensor) or value.ndim == 0:
                    continue
                ours, theirs = value[i], batch[name][row]
                if name.startswith("prompt_"):
                    ours, theirs = ours[real["prompt"]], theirs[was["prompt"]]
                elif name == "expert_ids":
                    ours, theirs = ours[both], theirs[all_of_it]
                elif ours.ndim:
                    ours, theirs = ours[real["completion"]], theirs[was["completion"]]
                assert torch.equal(ours, theirs), name
    assert narrower > 2


def test_one_column_is_left_where_every_completion_is_masked():
    batch = {
        "prompt_ids": torch.tensor([[0, 7], [8, 9]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "completion_mask": torch.zeros(2, 3, dtype=torch.long),
        "advantages": torch.tensor([1.0, 2.0]),
        "importance_sampling_ratio": torch.tensor([[3.0], [4.0]]),  # of whole sequences
        "old_per_token_logps": None,
    }
    found = cut(batch, [0])
    assert found["prompt_ids"].tolist() == [[7]] and found["completion_ids"].tolist() == [[1]]
    assert found["advantages"].tolist() == [1.0] and found["importance_sampling_ratio"].tolist() == [[3.0]]
    assert found["old_per_token_logps"] is None


def test_a_tensor_that_nobody_knows_is_named():
    masks = {"prompt_mask": torch.ones(2, 3), "completion_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"'mine' of a generation batch has the shape \(2, 3\)"):
        cut({**masks, "mine": torch.ones(2, 3)}, [0])


# --------------------------------------------------------------------------------------------------------- the step


def total(made, parts):
    """Loss and gradient of an optimiser step: sums over its micro-batches."""
    made.model.zero_grad()
    loss = 0.0
    for part in parts:
        found = made.compute_loss(made.model, dict(part))
        found.backward()
        loss += found.item()
    return loss, {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_a_step_is_that_of_trl_s_own_split(tmp_path, case):
    """Loss and gradient, on rows of which some are lost: not one token of them is trained on."""
    made, batch = batch_of(tmp_path, model().double(), **OBJECTIVES[case])
    made.model.double()
    assert (batch["tool_mask"] * batch["completion_mask"])[[1, 9]].sum() == 0 and batch["tool_mask"][0, 0] == 1
    theirs = utils.split_tensor_dict(utils.shuffle_sequence_dict(batch), made.args.steps_per_generation)
    ours = micro_batches(batch, made.args, made.accelerator, False, False)
    assert len(ours) == len(theirs) == 4 and sequences(ours[-1])[0].numel() < sequences(theirs[0])[0].numel()
    expected, gradient = total(made, theirs)
    found, own = total(made, ours)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert own.keys() == gradient.keys()
    far, length = (
        torch.stack([value.double().norm() for value in some]).norm()
        for some in ([own[name] - gradient[name] for name in own], gradient.values())
    )
    assert length > 1e-3 and far <= 1e-6 * length


def test_log_probs_do_not_see_the_padding(tmp_path):
    made, batch = batch_of(tmp_path, objective="grpo")
    made.model.eval()
    batch["row"] = torch.arange(16)

    def score(some):
        with torch.no_grad():
            return made._get_per_token_logps_and_entropies(made.model, *sequences(some), compute_entropy=True)[:2]

    made.generation_step.scored = True
    logp, entropy = score(batch)
    for part in micro_batches(batch, made.args, made.accelerator, False, False):
        rows, mask = part["row"], part["completion_mask"].bool()
        for whole_batch, own in zip((logp, entropy), score(part), strict=True):
            assert torch.allclose(own[mask], whole_batch[rows][:, : mask.size(1)][mask], rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.distributed
def test_two_processes(tmp_path):
    """Whole groups on both ranks, and training ends also where a group lies on both and the ranks' rows differ."""
    worker = str(Path(__file__).parents[1] / "support" / "micro_batch_cases.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, worker, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for shared, (case, (group, size, accumulation)) in product(SHARED, CASES.items()):
        found = [rank[shared][case] for rank in ranks]
        assert found[0]["weights"] == found[1]["weights"]
        for rank in found:
            parts = rank["parts"]
            assert rank["steps"] == 2 and len(parts) == 2 * accumulation
            for start in (0, accumulation) if size != 6 else ():  # what fits nowhere is in the order of chance
                step = parts[start : start + accumulation]
                lengths = [width for _, width, _, _ in step]
                if shared != "off":  # a row of the forward is a run of siblings behind one prompt
                    lengths = [tokens for _, _, _, packed in step for tokens in packed]
                assert lengths == sorted(lengths, reverse=True), (shared, case)
            for prompts, *_ in parts:
                assert len(prompts) == size
                runs = [len(list(rows)) for _, rows in groupby(prompts)]
                assert set(runs) == {min(group, size)} or (size == 6 and sorted(runs) == [2, 4]), (shared, case)
    for shared in SHARED:
        straddling = [
            {p for prompts, *_ in rank[shared]["eight, and the second on both ranks"]["parts"] for p in prompts}
            for rank in ranks
        ]
        assert straddling[0] & straddling[1]
        ranks_of_a_step(shared, [rank[shared]["two in one of four"] for rank in ranks])


def ranks_of_a_step(shared, found):
    """The longest two of a step's eight groups are trained on at the same time, then the next two; some were moved."""
    moved = 0
    for rank in found:
        moved += len({name for names, *_ in rank["parts"] for name in names} - set(rank["sampled"]))
    for start in (0, 2):
        own = [
            [tokens for part in rank["parts"][start : start + 2] for tokens in part[2 + (shared != "off")]]
            for rank in found
        ]
        assert [len(lengths) for lengths in own] == [4, 4]
        ordered = sorted(own[0] + own[1], reverse=True)
        assert sum(map(max, *own)) <= sum(ordered[::2]) / 0.98
    assert moved
