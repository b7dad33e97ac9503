"""Two real processes (gloo) take the same step as one: weights, teacher, siblings shown, metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import distance
from distributed_cases import CASES, HALF, SHARDED, run
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SAME = ("loss", "grad_norm", "reward", "route/entropy", "cost/per_query_usd", "route/share/none")


def launched(folder, *cases):
    script = str(Path(__file__).parents[1] / "support" / "distributed_cases.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, str(folder), *cases], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """One launch for all cases."""
    return launched(tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(two_processes, tmp_path, case):
    alone, record = run(tmp_path, case, 1)
    ranks = [json.loads((two_processes / f"{case}_rank{r}.json").read_text()) for r in (0, 1)]
    tensors = [load_file(two_processes / f"{case}_rank{r}.st") for r in (0, 1)]

    for step, plan in enumerate(record["plans"]):
        parts = [rank["plans"][step] for rank in ranks]
        for key in ("distilled", "shown", "notes"):
            assert parts[0][key] + parts[1][key] == plan[key], "the ranks decided otherwise than one process"
        assert any(plan["distilled"]) and not all(plan["distilled"])
        if case.startswith("idle"):
            assert any(parts[0]["distilled"]) and not any(parts[1]["distilled"]) and len(parts[1]["distilled"]) == HALF
        if case == "feedback":
            assert any(plan["notes"]) and any(plan["shown"])

    assert record["moved"] > 1e-3
    for other in tensors:
        assert distance(alone, other) <= 1e-5 * record["moved"]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]), "the ranks drifted apart"

    logs = [entry for entry in record["log"] if "loss" in entry]
    theirs = [entry for entry in ranks[0]["log"] if "loss" in entry]
    names = [name for name in logs[0] if name in SAME or name.startswith(("srpo/", "loss/"))]
    assert len(names) > 10
    for name in names:
        assert [e[name] for e in theirs] == pytest.approx([e[name] for e in logs], rel=1e-5, abs=1e-6), name


def test_two_processes_resume_inside_a_generation_batch(two_processes):
    assert [json.loads((two_processes / f"resumed_rank{r}.json").read_text()) for r in (0, 1)] == [True, True]
    checkpoint = two_processes / "resume" / "checkpoint-3"
    assert sorted(path.name for path in checkpoint.glob("rollouts_*")) == [f"rollouts_{r}.safetensors" for r in (0, 1)]


@pytest.mark.slow
def test_sharded_ranks_distil_in_step(tmp_path):
    """ZeRO-3: ranks that distil different numbers of tokens, or none, gather as often as each other."""
    launched(tmp_path, *SHARDED)
    for case in SHARDED:
        _, record = run(tmp_path / "alone", case, 1)
        ranks = [json.loads((tmp_path / f"{case}_rank{r}.json").read_text()) for r in (0, 1)]
        assert not case.count("idle") or not any(any(plan["distilled"]) for plan in ranks[1]["plans"])
        logs, theirs = ([e for e in r["log"] if "loss" in e] for r in (record, ranks[0]))
        for name in ("loss", "grad_norm", "srpo/distilled_share"):
            expected = pytest.approx([e[name] for e in logs], rel=1e-4, abs=1e-6)
            assert [e[name] for e in theirs] == expected, (case, name)
