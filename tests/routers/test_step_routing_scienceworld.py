"""One command in ScienceWorld, in small; skipped where the package or Java is not installed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

from routers.tasks.step_routing.profiles import read_profiles
from srpo import train
from srpo.run.whole import newest

RECIPE = ROOT / "recipes/quickstart/bopo_scienceworld.yaml"


def skip_without_it() -> None:
    pytest.importorskip("scienceworld", reason="ScienceWorld is not installed: pip install scienceworld")
    if shutil.which("java") is None:
        pytest.skip("ScienceWorld needs a Java runtime on the path")


def as_words(arguments: dict[str, Any]) -> list[str]:
    return [word for key, value in arguments.items() for word in (f"--{key}", str(value))]


@pytest.mark.slow
def test_one_command_in_scienceworld(tmp_path: Path) -> None:
    skip_without_it()
    types = "find-non-living-thing,lifespan-shortest-lived,power-component"
    arguments = {
        "config": RECIPE, "output_dir": tmp_path / "out",
        "train_tasks": f"train:{types}", "train_limit": 3, "heldout_tasks": f"dev:{types}", "heldout_limit": 3,
        "step_limit": 8, "max_steps": 1, "logging_steps": 1, "sft_epochs": 1, "sft_sweep": 2,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_turns": 8, "warmup_steps": 0,
    }  # fmt: skip
    played = train.main(as_words(arguments))
    assert set(played.frame["set"]) == {"dev"} and "bopo" in played.routers
    out = tmp_path / "out"
    assert json.loads((out / "task" / "settings.json").read_text())["environment"] == "scienceworld"
    [planned] = [p for p in read_profiles(out / "profiles.parquet") if p.task_type == "power-component"]
    assert planned.p_large == 1 and planned.p_small < 1 and planned.cost_large > planned.cost_small
    episodes = played.frame
    assert not episodes["violated"].any()
    assert ((episodes["score"] > 0) & (episodes["score"] < 1)).any(), "scores are progress"
    large = episodes[episodes["router"] == "always-large"].set_index("family")["score"]
    assert large["power-component"] == large["lifespan-shortest-lived"] == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("told", ["the launcher", "every process"])
def test_two_that_are_told_to_end_leave_a_whole_checkpoint_and_no_process(tmp_path: Path, told: str) -> None:
    """In training, with a Java process of each rank alive."""
    skip_without_it()
    out, types = tmp_path / "out", "find-non-living-thing,power-component"
    arguments = {
        "output_dir": out, "train_tasks": f"train:{types}", "train_limit": 2, "heldout_tasks": f"dev:{types}",
        "heldout_limit": 2, "step_limit": 4, "max_steps": 100000, "logging_steps": 1, "sft_epochs": 0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_turns": 4, "warmup_steps": 0,
        "profile_runs": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "srpo", "train", str(RECIPE), "--processes", "2", *as_words(arguments)]
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ})
    watched, seen = psutil.Process(launcher.pid), {}
    try:
        until = time.monotonic() + 800
        while "[train] step " not in (words := (tmp_path / "said.txt").read_text()):
            assert launcher.poll() is None and time.monotonic() < until, words[-4000:]
            time.sleep(0.2)
        seen = {one.pid: one for one in watched.children(recursive=True)}
        java = [one for one in seen.values() if one.name() == "java"]
        assert len(java) >= 2, "each rank has its simulators"
        for one in [watched] if told == "the launcher" else [watched, *seen.values()]:  # as Slurm does
            one.send_signal(signal.SIGTERM)
        assert launcher.wait(300) == 0, (tmp_path / "said.txt").read_text()[-4000:]
        assert psutil.wait_procs([*seen.values()], timeout=30)[1] == []
    finally:
        for one in (*seen.values(), watched):
            if one.is_running():
                one.kill()
    found = newest(out, pytest.fail)
    assert found is not None and (found / "environment_1.json").exists()
    assert (tmp_path / "said.txt").read_text().count("[signal] SIGTERM") == 1
