"""The whole quickstart of budgets in miniature, as users run it: killed and resumed, and in two processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "train_limit": 12, "heldout_limit": 3, "sft_epochs": 1, "max_steps": 4, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 16, "use_cpu": True,
}  # fmt: skip


def command(output: Path, processes: int = 1, **changes: Any) -> list[str]:
    settings = {"config": ROOT / "recipes/quickstart/bopo.yaml", "output_dir": output, **SMALL, **changes}
    # Not `accelerate launch --cpu`, which runs one process whatever it is told.
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, *(several if processes > 1 else []), "-m", "srpo.train", *words]


def run(output: Path, **changes: Any) -> str:
    done = subprocess.run(command(output, **changes), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def steps(output: Path) -> list[dict[str, Any]]:
    """Logged numbers of each step."""
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def completions(output: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(output / "completions" / f"completions_{step:05d}.parquet")


def evaluation(output: Path) -> pd.DataFrame:
    """All of it but how long it took."""
    return pd.read_parquet(output / "evaluation.parquet").drop(columns="seconds")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight")
    run(output)
    assert {"start", "bopo", "always-large"} <= set(pd.read_parquet(output / "evaluation.parquet")["router"])
    return output


def test_killed_and_resumed_is_the_same_run_bit_for_bit(straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(output), stdout=log, stderr=log)
        # The environment's state is the last that a checkpoint gets.
        while not (output / "checkpoint-2" / "environment_0.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (output / "model.safetensors").exists() and not (output / "checkpoint-4").exists()
    run(output, resume_from_checkpoint=output / "checkpoint-2")

    for name in ("model.safetensors", "start/model.safetensors", "profiles.parquet"):
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    pd.testing.assert_frame_equal(*(evaluation(folder) for folder in (output, straight)))
    for step in (3, 4):  # what was sampled after the kill, decision by decision
        pd.testing.assert_frame_equal(completions(output, step), completions(straight, step))
    assert steps(output)[-1]["cost/spent_usd"] == steps(straight)[-1]["cost/spent_usd"]


def test_two_processes_are_one_run(straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = run(output, processes=2, gradient_accumulation_steps=1)  # 2 x 16 episodes a step, as 16 x 2 in one process
    assert said.count("training tasks:") == 1, "both processes told everything, or there were no two"
    profiled = "task/profiles_train.parquet"
    assert (output / profiled).read_bytes() == (straight / profiled).read_bytes()
    assert sorted(path.name for path in (output / "checkpoint-4").glob("environment_*.json")) == [
        "environment_0.json", "environment_1.json",
    ]  # fmt: skip

    tables = [completions(output, step) for step in (1, 2, 3, 4)]
    spent = 0.0
    for table, logged in zip(tables, steps(output), strict=True):
        assert len(table) == 32 and logged["budget/violations"] == 0.0
        assert logged["budget/large_calls"] == pytest.approx(table["large_calls"].mean())
        spent += table["cost"].sum()
        assert logged["cost/spent_usd"] == pytest.approx(spent)
    # Both ranks have played their share of the held-out tasks.
    both, alone = evaluation(output), evaluation(straight)
    keys = ["router", "item", "cap", "seed"]
    assert both[keys].sort_values(keys).values.tolist() == alone[keys].sort_values(keys).values.tolist()
    rules = [frame[frame["kind"].isin(["rule", "member"])].reset_index(drop=True) for frame in (both, alone)]
    pd.testing.assert_frame_equal(*rules)
    # Every episode of both ranks counts for the profiles.
    profiles = pd.read_parquet(output / "profiles.parquet")
    assert profiles["policy_runs"].sum() == 4 * 32 and (profiles["policy_runs"] % 8 == 0).all()
    assert profiles["policy_successes"].sum() == (pd.concat(tables)["correct"] >= 1).sum() > 0
