"""Replay of the bare model with sharded weights; the trainer's own runs are in `test_replay_trainer.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp2_and_zero3_replay_exactly(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "replay_two_processes.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "out").read_text())
    assert sorted(results) == ["fsdp2", "fsdp2_hooks_first", "zero3"]
    for name, result in results.items():
        assert result["exact"], f"{name}: the experts ran other ids than the replayed ones"
        assert result["error"] < 1e-5, f"{name}: the gates' gradient is not that of one process"
        assert result["sampling"], f"{name}: routes of generate are not those of a forward"
