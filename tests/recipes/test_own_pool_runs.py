"""Whole runs on a table of one's own, without the optional `family` column: trained, resumed in the folder, scored."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_bad_rows_in_recipes import table

from srpo import evaluate, train
from srpo.run.derived import StaleArtefact
from srpo.run.files import FolderTaken

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "use_cpu": "true", "bf16": "false", "num_generations": 4, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1,
    "disable_tqdm": "true", "report_to": "none", "train_limit": 16, "heldout_limit": 4, "sft_batch_size": 8,
    "sft_epochs": 1, "sft_limit": 8, "lora_r": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "srpo": {"mask_routes": "true"},
    "think_route": {"sft_drills": 0, "members": ["a", "b"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OWN))
def test_a_run_goes_on_in_its_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given: dict[str, Any] = {"config": ROOT / f"recipes/quickstart/{name}.yaml", "output_dir": out}
    given |= {**SMALL, **OWN[name], "table": table(tmp_path, 60), "catalogue": tmp_path / "catalogue.yaml"}

    def words(**changes: Any) -> list[str]:
        return [
            str(word)
            for key, value in {**given, **changes}.items()
            for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
        ]

    found = train.main(words())
    assert {"start", "srpo"} < set(found.routers) and "oracle" in found.routers
    assert json.loads((out / "run.json").read_text())["finished"]
    assert (out / "base" / "model.safetensors").exists(), "what the adapter is for"
    for folder in (out, out / "start", out / "checkpoint-2"):
        assert (folder / "router.yaml").is_file()
    with pytest.raises(FolderTaken, match=r"holds a finished run: resume_from_checkpoint: .*checkpoint-2 to go on"):
        train.main(words())
    resume = {"resume_from_checkpoint": out / "checkpoint-2", "max_steps": 4}
    with pytest.raises(StaleArtefact, match=r"was made with sft_learning_rate=.*, now it is 0\.5"):
        train.main(words(**resume, sft_learning_rate=0.5))
    scores = out / "start" / "evaluation.parquet"
    before = scores.stat().st_mtime_ns
    train.main(words(**resume))
    assert scores.stat().st_mtime_ns == before, "the start and its evaluation are those of the first run"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["max_steps"] == 4
    parts = sorted((out / "completions").glob("*.parquet"))
    assert pd.concat([pd.read_parquet(part) for part in parts])["step"].value_counts().to_dict() == dict.fromkeys(
        range(1, 5), 8
    )

    if name == "srpo":  # an action may be broken, but a route that is written is to a member
        errors = pd.concat([pd.read_parquet(part) for part in parts])["format_error"]
        assert not errors.str.contains("member").any()

    told = [str(out), "--output_dir", str(tmp_path / "again"), "--heldout_limit", "4"]
    first, second = evaluate.main(told), evaluate.main(told)
    assert first.frame.equals(second.frame), "the same may be evaluated again"
    with pytest.raises(FolderTaken, match=r"evaluation.parquet was made with cost_weight="):
        evaluate.main([*told, "--cost_weight", "0.1"])
    with pytest.raises(FolderTaken, match="holds a training run"):
        evaluate.main([str(out), "--output_dir", str(out)])
