"""One command in ScienceWorld, in small; skipped where the package or Java is not installed."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

from routers.tasks.step_routing.profiles import read_profiles
from srpo import train


@pytest.mark.slow
def test_one_command_in_scienceworld(tmp_path: Path) -> None:
    pytest.importorskip("scienceworld", reason="ScienceWorld is not installed: pip install scienceworld")
    if shutil.which("java") is None:
        pytest.skip("ScienceWorld needs a Java runtime on the path")
    types = "find-non-living-thing,lifespan-shortest-lived,power-component"
    arguments = {
        "config": ROOT / "recipes/quickstart/bopo_scienceworld.yaml", "output_dir": tmp_path / "out",
        "train_tasks": f"train:{types}", "train_limit": 3, "heldout_tasks": f"dev:{types}", "heldout_limit": 3,
        "step_limit": 8, "max_steps": 1, "logging_steps": 1, "sft_epochs": 1, "sft_sweep": 2,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_turns": 8, "warmup_steps": 0,
    }  # fmt: skip
    played = train.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))])
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
