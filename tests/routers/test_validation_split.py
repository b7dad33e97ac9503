"""`eval_strategy`: the best checkpoint is chosen on items that are neither trained on nor held out, in every task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_helpers import config

from routers.data.folds import folds, parted
from routers.data.table import ReplyTable, quickstart_table
from routers.tasks.query_routing.task import QueryRouting
from routers.tasks.step_routing.task import StepRouting
from routers.tasks.think_route.task import ThinkRoute
from srpo.recipe import load_run
from srpo.rollout.shared import load_checkpoint
from srpo.task import RunArguments, Share
from srpo.train import main

ROOT = Path(__file__).resolve().parents[2]


def test_items_of_one_text_lie_in_one_part() -> None:
    texts = [f"question {i}" for i in range(7)] + ["Question 3?", " question  5", "question 3"]
    parts = folds(texts)
    assert len(parts) == 5 and sorted(np.concatenate(parts)) == list(range(10))
    assert [p for p in parts if 3 in p] == [p for p in parts if 7 in p] == [p for p in parts if 9 in p]
    learned, aside = parted(texts, True)
    assert not {*learned} & {*aside} and sorted([*learned, *aside]) == list(range(10))
    assert (np.array(parted(texts, True)[1]) == aside).all() and len(parted(texts, False)[1]) == 0
    # of distinct texts they are the folds that settings of baselines were always chosen on
    order = np.array_split(np.random.default_rng(0).permutation(23), 5)
    assert all((a == b).all() for a, b in zip(folds([f"q{i}" for i in range(23)]), order, strict=True))
    assert folds([]) == [] and len(folds(["", ""])) == 2
    with pytest.raises(ValueError, match=r"eval_strategy sets a fifth .* too few"):
        parted(["one", "One?"], True)


def tasks(folder: Path, strategy: str, **more: Any) -> dict[str, Any]:
    """Every task, loaded."""
    args = {"eval_strategy": strategy, "eval_steps": 1, "per_device_train_batch_size": 8}
    found: dict[str, Any] = {
        "query": QueryRouting(
            QueryRouting.Arguments(table="quickstart"),
            RunArguments("query_routing", train_limit=60),
            config(folder, **args),
        ),
        "think": ThinkRoute(
            ThinkRoute.Arguments(table="quickstart"),
            RunArguments("think_route", train_limit=60, heldout_limit=20),
            config(folder, **args),
        ),
        "step": StepRouting(
            StepRouting.Arguments(train_caps=[2.0, 4.0], **more),
            RunArguments("step_routing", train_limit=15, heldout_limit=3),
            config(folder, max_observation_tokens=100, **args),
        ),
    }
    for task in found.values():
        task.load(folder)
    return found


def trained(task: Any) -> list[str]:
    if isinstance(task, StepRouting):
        return [row["task"] for row in task._begin()]
    return [row["query_id"] for row in (task.queries if isinstance(task, QueryRouting) else task.train)]


@pytest.mark.parametrize("kind", ["query", "think", "step"])
def test_a_fifth_is_set_aside_only_where_it_is_asked_for(kind: str, tmp_path: Path) -> None:
    with_, without = (tasks(tmp_path, strategy)[kind] for strategy in ("steps", "no"))
    assert without.validation == [] and len(with_.validation) == len({*trained(without)}) // 5
    assert {*trained(with_)} | {*with_.validation} == {*trained(without)}
    assert not {*trained(with_)} & {*with_.validation}
    heldout = {
        "query": lambda: {query["query_id"] for query in quickstart_table().queries("heldout")},
        "think": lambda: {row["query_id"] for row in with_.heldout},
        "step": lambda: {name for types in with_.tasks.heldout().values() for name in types},
    }[kind]()
    assert heldout and not heldout & {*with_.validation}


def test_step_routing_chooses_on_its_validation_tasks(tmp_path: Path) -> None:
    task = tasks(tmp_path, "steps", validation_tasks="generated/validation")["step"]
    assert task.validation == list(task.tasks.validation()) and len({*trained(task)}) == 15
    with pytest.raises(ValueError, match="validation_tasks: generated/train is trained on or held out"):
        tasks(tmp_path, "steps", validation_tasks="generated/train")


@pytest.mark.slow  # 35 s
def test_a_run_says_which_items_chose_its_checkpoint(tmp_path: Path) -> None:
    given = {
        **{"train_limit": 40, "heldout_limit": 12, "max_steps": 2, "num_generations": 2, "sft_epochs": 0},
        **{
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "learning_rate": 0.01,
        },
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": "true", "word_dropout": 0, "output_dir": tmp_path / "out"},
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    argv = ["--config", str(ROOT / "recipes" / "quickstart" / "srpo.yaml"), *words]
    main(argv)
    out = tmp_path / "out"
    items = json.loads((out / "validation.json").read_text())["items"]
    table: ReplyTable = quickstart_table()
    split = {query["query_id"]: query["split"] for query in table.queries()}
    assert len(items) == 8 and {split[item] for item in items} == {"train"}

    state = json.loads((out / "trainer_state.json").read_text())
    logged = {record["step"]: record["eval_reward"] for record in state["log_history"] if "eval_reward" in record}
    assert [*logged] == [0, 1, 2] and state["best_metric"] == max(logged.values())
    task_class, (arguments, how, args) = load_run(argv)
    task = task_class(arguments, how, args)
    task.load(tmp_path)
    for step, reward in logged.items():  # what each checkpoint earns on these items, played anew
        assert task.validate(*load_checkpoint(str(out / f"checkpoint-{step}")), Share()).mean_reward() == reward
    told = (out / "report.md").read_text()
    assert "On 8 items (validation.json), which were neither trained on nor held out." in told
    assert f"{max(logged.values()):.4f}" in told and told.splitlines()[2] in (out / "README.md").read_text()
    assert "Choice of the best checkpoint" in (out / "report.html").read_text()
