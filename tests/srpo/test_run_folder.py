"""One folder, one run: what a claim takes, refuses and takes away, on real folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from srpo.recipe import Recipe, RecipeError
from srpo.run.files import FolderTaken
from srpo.run.folder import claim as look
from srpo.run.folder import finish
from srpo.run.whole import seal


def claim(*args: Any, **kwargs: Any) -> Path:
    return look(*args, **kwargs).take()


def recipe(folder: Path, **given: Any) -> Recipe:
    made = Recipe()
    made.given, made.path = {"output_dir": str(folder), "learning_rate": 1e-6, **given}, None
    return made


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def checkpoint(folder: Path, step: int) -> Path:
    write(folder / f"checkpoint-{step}" / "trainer_state.json", json.dumps({"global_step": step}))
    write(folder / f"checkpoint-{step}" / "model.safetensors")
    write(folder / f"checkpoint-{step}" / "rng_state.pth")
    seal(folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def run(folder: Path, steps: tuple[int, ...] = (10, 20), done: bool = True, **given: Any) -> None:
    """What a run leaves."""
    claim(recipe(folder, **given), folder)
    for step in steps:
        checkpoint(folder, step)
        write(folder / "completions" / f"completions_{step:05d}.parquet")
    write(folder / "model.safetensors")
    write(folder / "runs" / "Nov29_host" / "events.out.tfevents.1")
    write(folder / "task" / "profiles_train.parquet")
    if done:
        finish(folder)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_a_finished_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for changes in ({}, {"learning_rate": 0.5}):
        with pytest.raises(FolderTaken, match=r"holds a finished run.*checkpoint-20.*overwrite: true"):
            claim(recipe(folder, **changes), folder)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["learning_rate"] == 1e-6


def test_a_run_that_was_stopped_goes_on_with_the_same_recipe_only(tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    claim(recipe(early), early)
    claim(recipe(early, learning_rate=0.1), early)  # a mistake before anything was made
    run(early, steps=(), done=False)
    claim(recipe(early, max_cost_usd=9.0, report_to="none"), early)  # how it is paid and watched may change
    with pytest.raises(FolderTaken, match="holds a run that did not finish with another learning_rate"):
        claim(recipe(early, learning_rate=0.5), early)
    run(late, done=False)
    with pytest.raises(FolderTaken, match=r"resume_from_checkpoint: .*checkpoint-20 to go on"):
        claim(recipe(late), late)


def test_overwrite_takes_away_what_runs_wrote_and_nothing_else(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    run(folder)
    mine = ["notes.txt", "settings.json", "data/pool.jsonl", "checkpoint-20/notes.txt", "completions/my.csv"]
    mine += ["runs/own/plot.png", "my-checkpoint-20/model.safetensors"]
    for name in mine:
        write(folder / name)
    claim(recipe(folder, overwrite=True, learning_rate=0.5), folder, overwrite=True)
    assert files(folder) == {*mine, "recipe.yaml", "run.json"}
    assert not (folder / "checkpoint-10").exists() and "notes.txt" in capsys.readouterr().out
    written = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert written["learning_rate"] == 0.5 and "overwrite" not in written


def test_files_that_no_run_wrote_are_never_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder / "config.json", "{}")
    write(folder / "model.safetensors")
    for overwrite in (False, True):
        with pytest.raises(FolderTaken, match=r"config.json, model.safetensors, which no run of these scripts wrote"):
            claim(recipe(folder), folder, overwrite=overwrite)
    assert files(folder) == {"config.json", "model.safetensors"}


def test_overwrite_keeps_what_the_recipe_reads(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder)
    write(folder / "start" / "config.json")
    before = files(folder)
    for key, value in {
        "model_name_or_path": str(folder / "start"),
        "profiles": str(folder / "task" / "profiles_train.parquet"),
        "train_data": ["nq", str(folder / "model.safetensors")],
        "task_dir": str(folder),
    }.items():
        with pytest.raises(FolderTaken, match=f"would take away what {key} names"):
            claim(recipe(folder, **{key: value}), folder, overwrite=True)
    assert files(folder) == before


def test_places_that_are_never_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "out"
    run(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(FolderTaken, match="working directory"):
        claim(recipe(folder), folder, overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderTaken, match="working directory"):
        claim(recipe(tmp_path), Path("."), overwrite=True)
    with pytest.raises(FolderTaken, match="working directory or your home"):
        claim(recipe(Path("/")), Path("/"), overwrite=True)
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(FolderTaken, match="your home"):
        claim(recipe(folder), folder, overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (folder / ".git").mkdir()
    with pytest.raises(FolderTaken, match="git repository"):
        claim(recipe(folder), folder, overwrite=True)
    assert (folder / "model.safetensors").exists()


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run(folder, steps=(10,))
    write(elsewhere / "completions_00001.parquet")
    (folder / "completions" / "completions_00010.parquet").unlink()
    (folder / "completions").rmdir()
    (folder / "completions").symlink_to(elsewhere)
    with pytest.raises(FolderTaken, match="completions is a symbolic link"):
        claim(recipe(folder), folder, overwrite=True)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FolderTaken, match="is a symbolic link"):
        claim(recipe(folder), tmp_path / "link", overwrite=True)
    assert (elsewhere / "completions_00001.parquet").exists() and (folder / "model.safetensors").exists()


def test_resuming_in_the_folder(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    run(folder)
    write(folder / "completions" / "completions_00023.parquet")
    with pytest.raises(FolderTaken, match=r"of step 10, and .* also holds .*checkpoint-20"):
        claim(recipe(folder), folder, resume=str(folder / "checkpoint-10"))
    with pytest.raises(FolderTaken, match="of step 20, and max_steps is 15"):
        claim(recipe(folder, max_steps=15), folder, resume=str(folder / "checkpoint-20"))
    with pytest.raises(FolderTaken, match=r"checkpoint-30 does not exist; there are .*checkpoint-10, .*checkpoint-20"):
        claim(recipe(folder), folder, resume=str(folder / "checkpoint-30"))
    with pytest.raises(FolderTaken, match=r"holds no trainer_state.json"):
        claim(recipe(folder), folder, resume=str(folder / "task"))
    with pytest.raises(RecipeError, match="overwrite: true takes away what resume_from_checkpoint goes on from"):
        claim(recipe(folder), folder, overwrite=True, resume=str(folder / "checkpoint-20"))
    assert (folder / "completions" / "completions_00023.parquet").exists()

    claim(recipe(folder, learning_rate=0.5, max_steps=40), folder, resume=str(folder / "checkpoint-20"))
    assert "learning_rate: 1e-06 -> 0.5" in capsys.readouterr().out
    left = sorted(path.name for path in (folder / "completions").iterdir())
    assert left == ["completions_00010.parquet", "completions_00020.parquet"], "what was logged later is undone"
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text())["learning_rate"]]
    finish(folder)
    recipes.append(yaml.safe_load((folder / "recipe.yaml").read_text())["learning_rate"])
    assert recipes == [1e-6, 0.5], "until the resumed run has finished, the folder says what is in it"


def test_a_checkpoint_of_another_folder_starts_a_new_run(tmp_path: Path) -> None:
    run(tmp_path / "one")
    claim(recipe(tmp_path / "two"), tmp_path / "two", resume=str(tmp_path / "one" / "checkpoint-20"))
    assert files(tmp_path / "two") == {"recipe.yaml", "run.json"}
    run(tmp_path / "three")
    with pytest.raises(FolderTaken, match="holds a finished run"):
        claim(recipe(tmp_path / "three"), tmp_path / "three", resume=str(tmp_path / "one" / "checkpoint-20"))


def test_a_run_from_before_there_was_a_mark_counts_as_finished(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder)
    (folder / "run.json").unlink()
    with pytest.raises(FolderTaken, match="holds a finished run"):
        claim(recipe(folder), folder)
    claim(recipe(folder), folder, overwrite=True)
    assert files(folder) == {"recipe.yaml", "run.json"}
