"""The script of budget-aware routing: demonstrations become the rollout's tokens, and one command runs it all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import step_helpers as steps
from core_helpers import config

ROOT = Path(__file__).resolve().parents[2]

from routers.evaluation.episodes import Episodes
from routers.tasks.step_routing.player import Driven
from routers.tasks.step_routing.router import StepRouter
from routers.tasks.step_routing.rules import random_mix
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.sft_rows import Demonstration, encode
from routers.tasks.step_routing.task import StepRouting
from routers.tasks.step_routing.world import check_folder
from srpo import evaluate, train
from srpo.rollout.loop import Limits, play
from srpo.rollout.turns import Sample
from srpo.scratch_lm import train_tokenizer
from srpo.task import RunArguments


class Replay:
    """A generator that writes given labels."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = list(labels)

    def generate(self, requests: Any) -> list[Sample]:
        return [Sample((self.labels.pop(0),), (0.0,), True) for _ in requests]

    def over(self, rows: Any) -> None: ...

    def finish(self) -> None: ...


def demonstration(row: Any, driven: Driven) -> Demonstration:
    said = [{"executor": name, "before": o.before, "body": o.body, "after": o.after} for name, o in driven.decisions]
    return Demonstration(row["task"], row["prompt"], said, "hard", 0.4, 1.0, 0.0)


def test_a_demonstration_has_the_tokens_of_the_rollout(tmp_path: Path) -> None:
    arguments = StepRouting.Arguments(train_caps=[2.0])
    args = config(tmp_path, max_observation_tokens=100, per_device_train_batch_size=8)
    task = StepRouting(arguments, RunArguments("step_routing", train_limit=2, heldout_limit=1), args)
    task.load(tmp_path)
    corpus = task.corpus()
    tokenizer = train_tokenizer(corpus.texts, vocab_size=corpus.vocab_size, whole=corpus.whole)
    rows, environment, settings = task.rows(tokenizer), task.environment(tokenizer), task.settings
    assert [row["cap"] for row in rows] == [2.0] * 2 and settings.observation_tokens == 100
    for row in rows:
        driven = steps.drive(environment, row, "seed", random_mix(0.4))
        got = encode(demonstration(row, driven), settings, tokenizer)
        decided = [label for label in got["labels"] if label != -100]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        limits = Limits(turns=20, tokens=1000, observation_tokens=100, step_seconds=60)
        [rolled] = play(environment, [row], [prompt["input_ids"]], ["seed"], Replay(decided), tokenizer, limits)
        assert [*rolled.prompt_ids, *(i for turn in rolled.turns for i in turn.ids)] == got["input_ids"]
        mine = [i for turn in rolled.turns if turn.owner == "policy" for i in turn.ids]
        assert mine == decided and len(mine) == len(driven.decisions)


def test_rows_carry_what_reward_and_advantage_read() -> None:
    from routers.tasks.step_routing.profiles import BoundaryProfile

    world = steps.world(train_limit=1, train_caps=[float("inf"), 1])
    [name] = world.train_tasks()
    profile = BoundaryProfile(name, "x", (0.0, 0.0), (0.1, 0.3), (1.0, 1.0), (1.0, 1.4))
    rows = world.completed(world.rows([name], world.arguments.train_caps), {name: profile})
    assert [row["cap"] for row in rows] == [None, 1]
    assert rows[0]["hard"] and rows[0]["cost_small"] == pytest.approx(0.2)
    assert rows[0]["references"] == pytest.approx([0.0, 2 - 0.3])  # R_S = 0; R_L = 1 + beta - lambda
    assert "<b*>" in rows[0]["prompt"][0]["content"] and "<b1>" in rows[1]["prompt"][0]["content"]


def test_a_task_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    def check(**fields: Any) -> None:
        check_folder(steps.world(**fields).profile_settings(), tmp_path / "t")

    check()
    check(train_limit=7)  # other tasks, same world
    with pytest.raises(ValueError, match="step_limit=20, the recipe says 30"):
        check(step_limit=30)


def test_help_of_the_task_needs_no_torch() -> None:
    code = "import sys, routers.tasks.step_routing.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.slow
def test_one_command_runs_it_all(tmp_path: Path, capsys: Any) -> None:
    """Profile, SFT, BoPO, evaluation, report, and the same policy evaluated again: in small."""
    out = tmp_path / "out"
    arguments = {
        "config": ROOT / "recipes/quickstart/bopo.yaml", "output_dir": out, "train_limit": 12,
        "heldout_limit": 6, "max_steps": 2, "logging_steps": 1, "sft_epochs": 1, "per_device_train_batch_size": 16,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    played = train.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))])
    assert "training tasks:" in capsys.readouterr().out
    aside = json.loads((out / "validation.json").read_text())["items"]
    assert len(aside) == 3 and not {*aside} & {*pd.read_parquet(out / "profiles.parquet")["task"]}
    assert (
        "On 3 items (validation.json), which were neither trained on nor held out." in (out / "report.md").read_text()
    )
    kinds = played.routers
    assert kinds["start"] == "start" and kinds["bopo"] == "policy"
    assert kinds["always-small"] == kinds["always-large"] == "member" and kinds["random mixing 0.1"] == "rule"
    frame = played.frame
    assert set(frame.loc[frame["router"] == "bopo", "cap"]) == {float("inf"), 1.0, 2.0, 4.0}
    assert not frame["violated"].any() and (frame["usd"] >= frame["policy_usd"]).all()
    names = """model.safetensors router.yaml start/router.yaml start/evaluation.parquet evaluation.parquet report.md
        report.html frontier.png profiles.parquet checkpoint-1/router.yaml demonstrations/train.parquet"""
    for name in names.split():
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "task" / "settings.json").read_text())["step_limit"] == 20
    assert "BoPO-style" in (out / "README.md").read_text()
    with StepRouter.from_pretrained(out / "checkpoint-1") as router:
        assert router.settings == StepSettings.load(out) and router.settings.observation == "compact"

    # The checkpoint by itself, elsewhere: the same episodes, and nothing of the training is needed.
    again = tmp_path / "again"
    words = [str(out), "--output_dir", str(again), "--heldout_limit", "4", "--train_tasks", "not/on/this/machine"]
    alone = evaluate.main(words)
    mine = Episodes.read(again).of(router="out").frame
    pd.testing.assert_frame_equal(alone.of(router="out").frame, mine)
    some = frame[(frame["router"] == "bopo") & frame["item"].isin(mine["item"])]
    columns = ["item", "cap", "score", "usd", "reward", "member", "stop"]
    pd.testing.assert_frame_equal(mine[columns].reset_index(drop=True), some[columns].reset_index(drop=True))


@pytest.mark.slow
def test_the_table_of_an_agent_s_run_is_what_its_episodes_say(tmp_path: Path, capsys: Any) -> None:
    """Printed, in the report and on the page; every family of rules first, at settings chosen on validation jobs."""
    out = tmp_path / "out"
    arguments = {
        "config": ROOT / "recipes/quickstart/agent.yaml", "output_dir": out, "train_limit": 10, "heldout_limit": 5,
        "max_steps": 1, "sft_epochs": 1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    train.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))])
    text, found = (out / "report.md").read_text(), Episodes.read(out)
    assert text in capsys.readouterr().out
    lines = (line for line in text.splitlines() if line.startswith("| "))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0].split(" (")[0]: row for row in rows[2 : [row[0] for row in rows].index("start") + 1]}
    chosen, families = found.header["train_reward"], set(found.frame["curve"]) - {""}
    assert list(table)[-2:] == ["bopo", "start"] and set(list(table)[:-2]) <= set(chosen)
    assert next(iter(table)) == max(chosen, key=chosen.__getitem__) and families == {
        "random mixing", "first-large", "cascade", "sticky", "escalate on error", "explore", "time-boxed", "arbitrage",
    }  # fmt: skip
    assert {found.of(router=name).frame["curve"].iloc[0] for name in table} == {*families, ""}
    page = (out / "report.html").read_text()
    for name, row in table.items():
        frame = found.of(router=name).frame
        assert row[1] == f"{frame['score'].mean():.1%}" and row[3] == f"{1000 * frame['usd'].mean():.4f}"
        assert row[4] == f"{frame['reward'].mean():.3f}" and row[3] in page
    beyond = [row[0] for row in rows if " beyond " in row[0]]
    assert sorted(beyond) == sorted(f"{name} beyond {family}" for name in ("bopo", "start") for family in families)
    assert beyond[0].startswith("bopo ") and "Prompt caches" in text
