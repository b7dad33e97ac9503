"""Whole runs of two processes with weights in parts: evaluated, saved and ended by both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_bad_rows_in_recipes import table

from routers.evaluation.episodes import Episodes
from srpo import train

CASE = Path(__file__).parents[1] / "support" / "sharded_run_case.py"


def words(tmp_path: Path, output: str, **changes: object) -> list[str]:
    given = {
        "task": "query_routing", "table": tmp_path / "table.jsonl", "catalogue": tmp_path / "catalogue.yaml",
        "output_dir": tmp_path / output, "use_cpu": "true", "bf16": "false", "num_generations": 2, "max_steps": 1,
        "per_device_train_batch_size": 2, "max_completion_length": 12, "save_strategy": "no", "report_to": "none",
        "activation_checkpointing": "false", "teacher_model_kind": "live", "max_grad_norm": 0.0, **changes,
    }  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_on_sharded_weights_evaluate_whole_ones(tmp_path: Path) -> None:
    table(tmp_path, 60)
    train.main(words(tmp_path, "first", sft_epochs=1, lora_r=0))
    alone = Episodes.read(tmp_path / "first" / "evaluation.parquet")
    start = tmp_path / "first" / "start"
    for engine in ("zero3", "fsdp2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(CASE)]
        told = words(tmp_path, engine, start_from=start, learning_rate=0.0)
        done = subprocess.run([*launch, engine, *told], capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert json.loads((tmp_path / engine / "run.json").read_text())["finished"]
        found = Episodes.read(tmp_path / engine / "evaluation.parquet")
        for router in ("start", "srpo"):  # a learning rate of 0: both are the policy that one process started from
            mine = found.of(router=router).frame.set_index("item").sort_index()
            theirs = alone.of(router="start").frame.set_index("item").sort_index()
            assert mine["member"].tolist() == theirs["member"].tolist() and len(mine) == len(theirs)
        assert (tmp_path / engine / "router.yaml").is_file()
    refused = subprocess.run(
        [*launch, "fsdp2", *words(tmp_path, "refused", sft_epochs=1)], capture_output=True, text=True, timeout=580
    )
    assert refused.returncode != 0 and "the supervised start runs on unsharded weights" in refused.stderr
