"""The script of budget-aware routing: demonstrations become the rollout's tokens, and one command runs it all."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

from routers.tasks.step_routing import task as train_bopo
from routers.tasks.step_routing import world as budget_task
from routers.tasks.step_routing.environment import Driven, drive
from routers.tasks.step_routing.router import StepRouter
from routers.tasks.step_routing.rules import random_mix
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.sft_rows import Demonstration
from srpo.rollout.generator import Sample
from srpo.rollout.loop import Limits, play
from srpo.scratch_lm import train_tokenizer


class Replay:
    """A generator that writes given labels."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = list(labels)

    def generate(self, requests: Any) -> list[Sample]:
        return [Sample((self.labels.pop(0),), (0.0,), True) for _ in requests]

    def finish(self) -> None: ...


def demonstration(row: Any, driven: Driven) -> Demonstration:
    said = [{"executor": name, "before": o.before, "body": o.body, "after": o.after} for name, o in driven.decisions]
    return Demonstration(row["task"], row["prompt"], said, "hard", 0.4, 1.0, 0.0)


def test_a_demonstration_has_the_tokens_of_the_rollout() -> None:
    task = budget_task.BudgetTask(train_count=2)
    rows = budget_task.make_rows(task, budget_task.train_tasks(task), [2.0])
    corpus = budget_task.corpus(task, rows)
    tokenizer = train_tokenizer(corpus.texts, vocab_size=600, whole=corpus.whole)
    environment = budget_task.make_environment(task)
    settings = StepSettings(tuple(task.executors), tuple(task.labels), task.observation, observation_tokens=100)
    for row in rows:
        driven = drive(environment, row, "seed", random_mix(0.4))
        got = train_bopo.tokens(demonstration(row, driven), settings, tokenizer)
        decided = [label for label in got["labels"] if label != -100]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        limits = Limits(turns=20, tokens=1000, observation_tokens=100, step_seconds=60)
        [rolled] = play(environment, [row], [prompt["input_ids"]], ["seed"], Replay(decided), tokenizer, limits)
        assert [*rolled.prompt_ids, *(i for turn in rolled.turns for i in turn.ids)] == got["input_ids"]
        mine = [i for turn in rolled.turns if turn.owner == "policy" for i in turn.ids]
        assert mine == decided and len(mine) == len(driven.decisions)


def test_rows_carry_what_reward_and_advantage_read() -> None:
    from routers.tasks.step_routing.profiles import BoundaryProfile

    task, bopo = budget_task.BudgetTask(train_count=1, train_caps=[float("inf"), 1]), train_bopo.BopoArguments()
    [name] = budget_task.train_tasks(task)
    profile = BoundaryProfile(name, "x", (0.0, 0.0), (0.1, 0.3), (1.0, 1.0), (1.0, 1.4))
    rows = train_bopo.training_rows(task, bopo.reward(), {name: profile})
    assert [row["cap"] for row in rows] == [None, 1]
    assert rows[0]["hard"] and rows[0]["cost_small"] == pytest.approx(0.2)
    assert rows[0]["references"] == pytest.approx([0.0, 2 - 0.3])  # R_S = 0; R_L = 1 + beta - lambda
    assert "<b*>" in rows[0]["prompt"][0]["content"] and "<b1>" in rows[1]["prompt"][0]["content"]


def test_a_task_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    def check(**fields: Any) -> None:
        budget_task.check_folder(budget_task.BudgetTask(**fields).profile_settings(), tmp_path / "t")

    check()
    check(train_count=7)  # other tasks, same world
    with pytest.raises(ValueError, match="step_limit=20, the recipe says 30"):
        check(step_limit=30)


@pytest.mark.slow
def test_one_command_runs_it_all(tmp_path: Path) -> None:
    """Profile, BoSFT, BoPO, evaluation, table and picture, in small."""
    arguments = {
        "config": ROOT / "recipes/quickstart/bopo.yaml", "output_dir": tmp_path / "out", "train_count": 12,
        "heldout_count": 6, "max_steps": 2, "logging_steps": 1, "bosft_epochs": 1, "per_device_train_batch_size": 16,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    text = train_bopo.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))])
    assert text is not None and "| policy " in text and "random mixing" in text
    out = tmp_path / "out"
    for name in (
        "model.safetensors",
        "step_router.yaml",
        "bosft/step_router.yaml",
        "episodes.parquet",
        "tables.md",
        "frontier.png",
        "profiles.parquet",
    ):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "task" / "settings.json").read_text())["step_limit"] == 20
    assert "BoPO-style" in (out / "README.md").read_text()
    with StepRouter.from_pretrained(out / "checkpoint-1") as router:
        assert router.settings == StepSettings.load(out) and router.settings.observation == "compact"
