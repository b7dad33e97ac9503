"""Whole runs on a table of one's own, without the optional `family` column: trained, resumed in the folder, scored."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_bad_rows_in_recipes import table

from routers.tasks.query_routing import evaluate
from routers.tasks.query_routing import task as train
from routers.tasks.think_route import evaluate as evaluate_think_route
from routers.tasks.think_route import task as train_think_route
from srpo.run.derived import StaleArtefact
from srpo.run.files import FolderTaken

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "use_cpu": "true", "bf16": "false", "num_generations": 4, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
    "disable_tqdm": "true", "report_to": "none", "train_limit": 16, "eval_limit": 4, "warm_start_batch_size": 8,
    "lora_r": 2,
}  # fmt: skip
WARM = {
    "srpo": {"warm_start_epochs": 1, "warm_start_limit": 8},
    "think_route": {"warm_start_passes": 1, "warm_start_limit": 8, "warm_start_drills": 0, "members": ["a", "b"]},
}
MAINS = {"srpo": train.main, "think_route": train_think_route.main}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MAINS))
def test_a_run_goes_on_in_its_folder(name: str, tmp_path: Path, capsys: Any) -> None:
    out, main = tmp_path / "out", MAINS[name]
    given: dict[str, Any] = {"config": ROOT / f"recipes/quickstart/{name}.yaml", "output_dir": out}
    given |= {**SMALL, **WARM[name], "table": table(tmp_path, 60), "catalogue": tmp_path / "catalogue.yaml"}

    def words(**changes: Any) -> list[str]:
        return [
            str(word)
            for key, value in {**given, **changes}.items()
            for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
        ]

    main(words())
    assert json.loads((out / "run.json").read_text())["finished"]
    assert (out / "base" / "model.safetensors").exists(), "what the adapter is for"
    with pytest.raises(FolderTaken, match=r"holds a finished run: resume_from_checkpoint: .*checkpoint-2 to go on"):
        main(words())
    resume = {"resume_from_checkpoint": out / "checkpoint-2", "max_steps": 4}
    with pytest.raises(StaleArtefact, match=r"was made with warm_start_learning_rate=.*, now it is 0\.5"):
        main(words(**resume, warm_start_learning_rate=0.5))
    scores = next((out / "warm_start").glob("*evaluation.json"))
    before = scores.stat().st_mtime_ns
    main(words(**resume))
    assert scores.stat().st_mtime_ns == before, "the warm start and its evaluation are those of the first run"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["max_steps"] == 4
    parts = sorted((out / "completions").glob("*.parquet"))
    assert pd.concat([pd.read_parquet(part) for part in parts])["step"].value_counts().to_dict() == dict.fromkeys(
        range(1, 5), 8
    )
    capsys.readouterr()

    again = tmp_path / "again"
    if name == "srpo":
        told = ["--model", str(out), "--table", given["table"], "--limit", "4", "--output", str(again)]
        assert evaluate.main(told) == evaluate.main(told), "the same may be evaluated again"
        with pytest.raises(SystemExit):
            evaluate.main([*told, "--cost-weight", "0.1"])
        assert "evaluation.json was made with cost_weight=0.2, now it is 0.1" in capsys.readouterr().err
        return
    told = words(model_name_or_path=out, output_dir=again)
    evaluate_think_route.main(told)
    with pytest.raises(FolderTaken, match=r"agent_evaluation.json was made with metric="):
        evaluate_think_route.main([*told, "--metric", "f1"])
    with pytest.raises(FolderTaken, match="holds a training run"):
        evaluate_think_route.main(words(model_name_or_path=out))
