"""R3 on two real processes (gloo): under ZeRO-3, FSDP2 and DDP the policy runs the experts that sampled."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
ENGINES = {
    "zero3": "DEEPSPEED DeepSpeedEngine",
    "fsdp2": "FSDP FSDPQwen3MoeForCausalLM",
    "ddp": "MULTI_CPU DistributedDataParallel",
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What both ranks wrote; one launch per kind."""
    folder = tmp_path_factory.mktemp("sharded")

    @cache
    def launch(kind):
        script = str(Path(__file__).parents[1] / "support" / "replay_sharded_cases.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
        done = subprocess.run([*command, str(folder), kind], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((folder / f"{kind}_{rank}.json").read_text()) for rank in (0, 1)]

    return launch


@pytest.mark.parametrize("kind", ["zero3", "fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_policy_runs_the_experts_that_sampled(launched, kind):
    for rank in launched(kind):
        assert rank["engine"] == ENGINES[kind], "this is not the engine that was asked for"
        assert len(rank["counts"]) == 4 and rank["again"] > 0, "four updates, with checkpointing"
        for tokens, same in rank["counts"]:
            assert tokens > 30 and same == tokens, f"{tokens - same} of {tokens} tokens ran other experts"
        first, last = rank["router/flip_rate"]
        assert first == 0.0 and last > 0.05, "native routing has left the replayed one, and only after an update"
        assert rank["router/fallback_fraction"] == [0.0, 0.0]
        assert max(rank["sampling/kl_k3"]) < 1e-9, "sampler and trainer are one fp32 engine"


def test_the_engines_take_the_same_first_steps(launched):
    """Later steps sample anew, where a last bit of a weight changes a token."""
    norms = [launched(kind)[0]["grad_norm"][:2] for kind in ("zero3", "fsdp2")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and min(norms[0]) > 0.1
