"""A mistake in recipe, data or model leaves the run that `overwrite: true` would replace as it was: the real mains."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_bad_rows_in_recipes import table
from test_run_folder import checkpoint, files, write

from srpo import evaluate, train
from srpo.recipe import Recipe, load_run
from srpo.run.derived import StaleArtefact, mark
from srpo.run.files import FolderTaken
from srpo.run.folder import claim, finish

QUARTER = {"sft_learning_rate": 0.25}
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "srpo": {"train_limit": 40, "heldout_limit": 4, "sft_limit": 16, "sft_epochs": 1},
    "bopo": {"train_limit": 8, "heldout_limit": 2},
    "think_route": {"train_limit": 40, "heldout_limit": 4, "sft_epochs": 0},
}


def words(name: str, folder: Path, **changes: Any) -> list[str]:
    given = {
        "config": ROOT / f"recipes/quickstart/{name}.yaml", "output_dir": folder, "use_cpu": "true", "bf16": "false",
        "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **SMALL[name],
        **changes,
    }  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    made, folder = Recipe(), tmp_path / "out"
    made.given, made.path = {"output_dir": str(folder), "learning_rate": 0.5}, None
    claim(made, folder).take()
    checkpoint(folder, 20)
    for name in ("model.safetensors", "start/model.safetensors", "base/model.safetensors", "quarantine.jsonl"):
        write(folder / name)
    for name in ("task/profiles_train.parquet", "evaluation.parquet", "report.html"):
        write(folder / name)
    finish(folder)
    return folder


def bad_table(folder: Path) -> str:
    return table(folder, 40, r8={"correct": 7}, r21={"correct": 7})


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("srpo", {"table": "no/table.parquet"}, "no/table.parquet"),
        ("srpo", {"table": bad_table, "max_bad_share": 0.01}, r"2 of 80 rows of .* are bad"),
        ("srpo", {"model_name_or_path": "./no-such-model"}, "is no folder here"),
        ("srpo", {"max_prompt_length": 5, "lora_r": 2}, "no row can be used: .* over-long prompt"),
        ("srpo", {"train_limit": 1}, "has 1 usable rows, and one batch of rollouts takes 2"),
        ("think_route", {"table": "no/table.parquet"}, "no/table.parquet"),
        ("think_route", {"unseen_members": "nobody"}, "unseen member 'nobody' is not in the pool"),
        ("think_route", {"max_prompt_length": 5}, "no row can be used"),
        ("bopo", {"profiles": "no/profiles.parquet"}, "there is no no/profiles.parquet"),
        ("bopo", {"heldout_tasks": "no/games.jsonl"}, "no/games.jsonl"),
        ("bopo", {"train_tasks": "no/games.jsonl"}, "no/games.jsonl"),
        ("bopo", {"cost_norm": "budget"}, "set budget_unit: usd"),
        ("bopo", {"train_limit": 1, "train_caps": 1}, "usable rows|cannot pay"),
    ],
)
def test_a_mistake_does_not_take_the_earlier_run_away(
    finished: Path, tmp_path: Path, name: str, changes: dict[str, Any], match: str
) -> None:
    before = {file: (finished / file).read_bytes() for file in files(finished)}
    changes = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=match):
        train.main(words(name, finished, overwrite="true", **changes))
    after = {file: (finished / file).read_bytes() for file in files(finished) if not file.startswith("checked/")}
    assert after == before


def test_a_model_that_cannot_be_read_does_not_either(finished: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write(broken / "config.json", '{"model_type": "of nobody"}')
    before = files(finished)
    for name in ("srpo", "bopo"):
        with pytest.raises(FileNotFoundError, match="broken cannot be loaded"):
            train.main(words(name, finished, overwrite="true", model_name_or_path=broken))
        assert files(finished) == before


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("srpo", {"sft_learning_rate": 0.5}),
        ("bopo", {"sft_learning_rate": 0.5}),
        ("think_route", {"sft_epochs": 1, "sft_learning_rate": 0.5}),
    ],
)
def test_a_resumed_run_with_another_start_is_refused_in_one_sentence(
    finished: Path, name: str, changes: dict[str, Any]
) -> None:
    resume = finished / "checkpoint-20"
    with pytest.raises(StaleArtefact, match=r"is missing or not whole \(no made_from.json\)"):
        train.main(words(name, finished, resume_from_checkpoint=resume, **changes))
    task_class, recipe = load_run(words(name, finished, resume_from_checkpoint=resume, **{**changes, **QUARTER}))
    began_from, _ = train._made_from(task_class(*recipe), *recipe[1:])
    mark(finished / "start", began_from)
    before = files(finished)
    with pytest.raises(StaleArtefact, match=r"with sft_learning_rate=0\.25, now it is 0\.5: set it back to go on"):
        train.main(words(name, finished, resume_from_checkpoint=resume, **changes))
    assert files(finished) == before


def test_what_was_found_comes_into_the_folder_with_the_run(finished: Path) -> None:
    again = Recipe()
    again.given, again.path = {"output_dir": str(finished), "learning_rate": 0.1}, None
    claimed = claim(again, finished, overwrite=True)
    write(claimed.notes / "quarantine_table.jsonl", "new")
    write(finished / "checked" / "quarantine_train_0.jsonl", "of an attempt before")
    claimed = claim(again, finished, overwrite=True)
    write(claimed.notes / "quarantine_table.jsonl", "new")
    assert (finished / "model.safetensors").exists()
    assert claimed.take() == claimed.take() == finished
    assert files(finished) == {"run.json", "recipe.yaml", "quarantine_table.jsonl"}
    assert (finished / "quarantine_table.jsonl").read_text() == "new" and not (finished / "checked").exists()


def test_an_attempt_that_never_began_stands_in_nobodys_way(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="2 of 80 rows"):
            train.main(words("srpo", tmp_path / "out", table=bad_table(tmp_path), max_bad_share=0.01))
        assert files(tmp_path / "out") == {"quarantine_table.jsonl"}, "no recipe of a run that never was"


@pytest.mark.distributed
def test_two_processes_end_with_one_line(finished: Path) -> None:
    body = (
        "import atexit, sys; from accelerate import PartialState\n"
        "from torch import distributed; atexit.register(lambda: print('group', distributed.is_initialized()))\n"
        "from srpo.cli import run; from srpo.recipe import Recipe; from srpo.run.folder import FolderTaken, claim\n"
        "def main():\n"
        "    PartialState(cpu=True); made = Recipe(); made.path = None\n"
        "    made.given = {'output_dir': sys.argv[1], 'learning_rate': 0.1}\n"
        "    try: claim(made, sys.argv[1], resume=sys.argv[1] + '/checkpoint-7')\n"
        "    except FolderTaken as error: print(error)\n"
        "    claim(made, sys.argv[1])\n"
        "run(main)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", body, str(finished)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (out_1, err_1) = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [2, 2], err + err_1
    assert "group False" in out, "its threads would outlive the interpreter, and could abort it"
    assert out == out_1 and "checkpoint-7 does not exist; there are" in out, "both hear what the first one found"
    lines = [line for line in (err + err_1).splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in err + err_1, err + err_1
    assert "holds a finished run with another learning_rate: resume_from_checkpoint: " in lines[0]


def test_an_evaluation_writes_over_nothing_else(finished: Path, tmp_path: Path) -> None:
    config = str(ROOT / "recipes/quickstart/srpo.yaml")
    for folder, match in (
        (finished, "holds a training run"),
        (tmp_path / "old", "nothing says what it was made from"),
    ):
        write(folder / "evaluation.parquet", "{}")
        with pytest.raises(FolderTaken, match=match):
            evaluate.main(["tiny", "--config", config, "--table", table(tmp_path, 10), "--output_dir", str(folder)])
        assert (folder / "evaluation.parquet").read_text() == "{}"
