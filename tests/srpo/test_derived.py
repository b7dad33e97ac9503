"""What is derived is used only for what it was derived from; names of policies; start policies told something else."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_bad_rows_in_recipes import table

from routers.evaluation.episodes import EPISODES, Episodes
from routers.tasks.step_routing import world
from routers.tasks.step_routing.task import StepRouting, _check_told_alike
from srpo import SRPOConfig, evaluate, train
from srpo.policy_name import check_policy_name
from srpo.recipe import load_recipe, load_run
from srpo.run.derived import StaleArtefact, check_made_from, digest, is_made_from, made_from, mark, source, unmark
from srpo.run.folder import claim
from srpo.task import RunArguments


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_policy_is_its_files_and_nothing_beside_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "policy" / "model.safetensors").parent
    write(folder / "config.json", "{}")
    first = digest(folder)
    for name in (
        "made_from.json",
        "run.json",
        "README.md",
        "evaluation.parquet",
        "trainer_state.json",
    ):
        write(folder / name)
    assert digest(folder) == first == source(folder)
    for name in ("model.safetensors", "tokenizer.json", "adapter_config.json", "chat_template.jinja"):
        before = digest(folder)
        write(folder / name, "other")
        assert digest(folder) != before, name
    assert source("owner/name") == "owner/name" and source(None) is None


def test_a_large_file_counts_by_parts_and_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    empty = digest(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert digest(path) != empty
    with path.open("r+b") as file:
        file.truncate(65 * 2**20 - 1)
    assert digest(path) != empty


def test_an_artefact_is_of_its_values_and_whole(tmp_path: Path) -> None:
    folder, values = write(tmp_path / "start" / "model.safetensors").parent, made_from(seed=0, rate=1e-3)
    with pytest.raises(StaleArtefact, match=r"the start: .* is missing or not whole"):
        check_made_from(folder, values, "the start")
    mark(folder, values)
    assert is_made_from(folder, values) and not is_made_from(folder, made_from(seed=0))
    with pytest.raises(StaleArtefact, match=r"was made with rate=0\.001, now it is 0\.5 \(and seed\): set it back"):
        check_made_from(folder, made_from(seed=1, rate=0.5), "the start")
    unmark(folder)
    assert not is_made_from(folder, values), "interrupted while it is made again"
    scores = write(folder / "evaluation.parquet")
    mark(scores, values)
    assert is_made_from(scores, values) and not is_made_from(folder, values), "a file has a mark of its own"
    write(folder / "evaluation.parquet.made_from.json", "half a fi")
    assert not is_made_from(scores, values)


def recipe(arguments: Any, **given: Any) -> Any:
    return load_recipe(arguments, [word for key, value in given.items() for word in (f"--{key}", str(value))])


@pytest.mark.parametrize("task", ["query_routing", "think_route"])
def test_a_start_is_of_its_model_table_and_settings(task: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model" / "model.safetensors").parent
    given = {"task": task, "output_dir": tmp_path / "out", "table": table(tmp_path, 10), "model_name_or_path": model}
    given |= {"use_cpu": "true", "bf16": "false"}

    def values(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        words = [word for key, value in {**given, **changes}.items() for word in (f"--{key}", str(value))]
        task_class, recipe = load_run(words)
        return train._made_from(task_class(*recipe), *recipe[1:])

    began, scored = values()
    assert values(learning_rate=0.5, max_steps=7, beta=0.1) == (began, scored), "what comes after it does not count"
    for change in (
        {"sft_learning_rate": 0.5}, {"sft_batch_size": 3}, {"sft_limit": 9}, {"seed": 3},
        {"lora_r": 2}, {"catalogue": tmp_path / "catalogue.yaml"},
    ):  # fmt: skip
        assert values(**change)[0] != began, change
    for change in ({"heldout_limit": 3}, {"format_weight": 0.1}, {"max_completion_length": 9}):
        assert values(**change)[0] == began and values(**change)[1] != scored, change
    for path in (Path(given["table"]), model / "model.safetensors"):
        before = values()[0]
        path.write_text(path.read_text() + " ")
        assert values()[0] != before, path


def step_routing(folder: Path, **fields: Any) -> StepRouting:
    run = RunArguments("step_routing", train_limit=2, heldout_limit=1)
    args = SRPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, max_observation_tokens=600, seed=0)
    return StepRouting(StepRouting.Arguments(**fields), run, args)


def test_demonstrations_are_of_the_rows_and_their_profiles(tmp_path: Path) -> None:
    task = step_routing(tmp_path, profile_runs=1, sft_sweep=2)
    columns = {"difficulty": "hard", "hard": True, "p_small": 0.0, "p_large": 1.0}
    rows = [{**row, **columns} for row in task.tasks.rows(task.tasks.train_tasks(), task.arguments.train_caps)]
    task._rows = rows
    first = task._demonstrations(tmp_path / "d")
    assert first and task._demonstrations(tmp_path / "d") == first
    for seed, other, match in ((1, rows, "seed=0, the recipe says 1"), (0, rows[:1], "was made with rows=")):
        task._rows, task.config.seed = other, seed
        with pytest.raises(ValueError, match=match):
            task._demonstrations(tmp_path / "d")
    task._rows = [{**row, "difficulty": "intractable", "hard": False} for row in rows]
    with pytest.raises(ValueError, match=r"there is nothing to imitate: .* of 2 training rows; raise sft_sweep"):
        task._demonstrations(tmp_path / "unsolved")


def test_profiles_are_of_the_settings_and_of_the_tasks_content(tmp_path: Path) -> None:
    folder, games = tmp_path / "task", write(tmp_path / "games.jsonl", "{}\n")
    catalogue = write(tmp_path / "catalogue.yaml", "members: []\n")
    tasks = step_routing(tmp_path, catalogue=str(catalogue), task_dir=str(folder)).tasks
    world.check_folder(tasks.profile_settings(), folder)
    world._check_content(str(games), folder)
    assert json.loads((folder / "parts.json").read_text()) == {str(games): source(games)}
    games.write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"holds profiles of .*games.jsonl as it was: its content has changed"):
        world._check_content(str(games), folder)
    catalogue.write_text("members: [] # dearer\n")
    with pytest.raises(ValueError, match="was made with catalogue_content='sha256:"):
        tasks.check_parts()


@pytest.mark.parametrize("name", ["./x", "~/x", "/no/where", "a/b/c", "", " ", "here/x", "file.txt", "empty"])
def test_what_cannot_be_a_policy_is_said_without_asking_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for made in ("here", "empty", "owned"):
        (tmp_path / made).mkdir()
    write(tmp_path / "file.txt")
    with pytest.raises(FileNotFoundError, match=r"is no folder here|holds neither config.json"):
        check_policy_name(name)
    write(tmp_path / "owned" / "adapter_config.json")
    for fine in ("owned", "./owned", "gpt2", "owner/name"):
        check_policy_name(fine)


def test_a_start_policy_that_was_told_something_else_is_refused(tmp_path: Path) -> None:
    def settings(**fields: Any) -> Any:
        return step_routing(tmp_path, **fields).settings

    settings().save(write(tmp_path / "config.json").parent)
    _check_told_alike(settings(step_limit=9, tail_calls=1), str(tmp_path))
    _check_told_alike(settings(), str(write(tmp_path / "foreign" / "config.json").parent))
    for fields, name in (
        ({"observation": "verbose"}, "observation"),
        ({"labels": ["<a>", "<b>"]}, "labels"),
        ({"budget_unit": "usd"}, "unit"),
        ({"environment": "scienceworld", "observation": "progress"}, "environment"),
    ):
        with pytest.raises(ValueError, match=f"was trained with {name}=.*set that, or give another start_from"):
            _check_told_alike(settings(**fields), str(tmp_path))


@pytest.mark.slow
def test_episodes_of_another_start_policy_are_never_those_of_the_start(tmp_path: Path) -> None:
    """A run in whose folder an evaluation of a start lies that had another learning rate."""
    out = tmp_path / "out"
    given = {
        "config": Path(__file__).resolve().parents[2] / "recipes/quickstart/bopo.yaml", "output_dir": out,
        "train_limit": 12, "heldout_limit": 2, "max_steps": 1, "sft_epochs": 1, "per_device_train_batch_size": 16,
        "use_cpu": "true", "bf16": "false",
    }  # fmt: skip
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    stale = out / "start" / EPISODES
    old = {"router": "start", "kind": "start", "item": "stale", "score": 0.0, "usd": 0.0, "reward": 0.0}
    Episodes(pd.DataFrame([old])).write(stale)
    mark(stale, made_from(policy="sha256:of another"))
    settled = claim(load_run(words)[1], tmp_path / "elsewhere").take()
    for name in ("run.json", "recipe.yaml"):
        (settled / name).rename(out / name)
    mine = train.main(words).of(router="start").frame
    assert len(mine) and "stale" not in set(mine["item"])
    # As the start itself, read from disk, plays them.
    again = evaluate.main([str(out / "start"), "--output_dir", str(tmp_path / "again")]).of(router="start").frame
    columns = ["item", "cap", "score", "calls", "usd"]
    pd.testing.assert_frame_equal(again[columns], mine[columns])
    with pytest.raises(ValueError, match="holds a finished run"):
        train.main([*words, "--sft_learning_rate", "0.5"])
