"""Two real processes (gloo) play episodes of different lengths and take the step of one; sharded policies too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import distance, model, weights
from rollout_cases import run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SAME = ("grad_norm", "reward", "rollout/turns", "rollout/stop/lost", "rollout/dropped_share", "cost/spent_usd")


def launched(folder, *cases):
    script = str(Path(__file__).parents[1] / "support" / "rollout_cases.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, str(folder), *cases], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def compared(folder, case, tmp_path):
    """One process against two; returns the two records."""
    alone, record = run(tmp_path, case, 1)
    ranks = [json.loads((folder / f"{case}_rank{r}.json").read_text()) for r in (0, 1)]
    ours = [entry for entry in record["log"] if "loss" in entry]
    theirs = [entry for entry in ranks[0]["log"] if "loss" in entry]
    assert len(ours) == len(theirs) == 2
    for name in SAME:
        found = [entry[name] for entry in theirs]
        assert found == pytest.approx([entry[name] for entry in ours], rel=1e-5, abs=1e-6), name
    both = load_file(folder / f"{case}_rank0.st")
    start = weights(model())
    alone, both = ({name: tensors[name] for name in start} for tensors in (alone, both))
    moved = distance(alone, start)
    assert moved > 1e-2 and distance(alone, both) <= 1e-5 * moved
    forwards = [record["forwards"] for record in ranks]
    assert [own for own, *_ in forwards[0]] != [own for own, *_ in forwards[1]], "both ranks did as much: no test"
    return ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launched(folder, "plain", "lost", "decisions", "gone", "gone_decisions", "ahead")
    return folder


@pytest.mark.parametrize("case", ["plain", "lost", "gone", "ahead"])
def test_ranks_with_different_numbers_of_turns(two, tmp_path, case):
    ranks = compared(two, case, tmp_path)
    for record in ranks:
        assert all(own == both and not sharded for own, both, sharded in record["forwards"]), "nobody waits for others"
    tensors = [load_file(two / f"{case}_rank{r}.st") for r in (0, 1)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    lost = [entry["rollout/stop/lost"] for entry in ranks[0]["log"] if "loss" in entry]
    # Of five that fail at their end, one has been ended before, by the limit of its tokens.
    assert lost == [{"plain": 0.0, "lost": 0.2, "gone": 0.5, "ahead": 0.2}[case]] * 2


@pytest.mark.parametrize("case", ["decisions", "gone_decisions"])
def test_a_rank_without_a_decision_beside_one_that_distils_them(two, tmp_path, case):
    ranks = compared(two, case, tmp_path)
    for record in ranks:  # a group needs a success too
        assert any(entry["srpo/distilled_share"] > 0 for entry in record["log"] if "loss" in entry)


@pytest.mark.slow
def test_a_sharded_policy_distils_decisions_in_step(tmp_path):
    """ZeRO-3: the head is gathered as often on a rank that has no decision at all."""
    launched(tmp_path, "zero3_decisions")
    compared(tmp_path, "zero3_decisions", tmp_path / "alone")


@pytest.mark.slow
def test_ranks_of_a_sharded_policy_stay_in_step(tmp_path):
    """ZeRO-3, gathered for generation (TRL's default) and not: then each rank takes as many forwards as the other."""
    launched(tmp_path, "zero3", "zero3_sharded")
    gathered = compared(tmp_path, "zero3", tmp_path / "alone")
    sharded = compared(tmp_path, "zero3_sharded", tmp_path / "alone")
    assert {record["kind"] for record in gathered + sharded} == {"DEEPSPEED:3"}
    for batch in zip(*(record["forwards"] for record in sharded), strict=True):
        assert all(flag for *_, flag in batch) and len({both for _, both, _ in batch}) == 1
        assert max(own for own, *_ in batch) == batch[0][1]
    assert all(own == both and not flag for record in gathered for own, both, flag in record["forwards"])


@pytest.mark.slow
def test_a_rank_of_a_sharded_policy_whose_episodes_are_all_lost_is_not_waited_for(tmp_path):
    """ZeRO-3, gathered and not: it asks for no turn at all, has no token to train on, and takes the same steps."""
    cases = ("zero3_gone", "zero3_sharded_gone", "zero3_gone_decisions")
    launched(tmp_path, *cases)
    for case in cases:
        ranks = compared(tmp_path, case, tmp_path / "alone")
        assert {record["kind"] for record in ranks} == {"DEEPSPEED:3"}
        for sampled, _, busy in ranks[1]["forwards"]:
            assert sampled == 0 and busy == (case == "zero3_sharded_gone")
