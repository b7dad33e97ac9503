"""AppWorld's own engine, apps and evaluator on the small world of `appworld_world`; skipped where it is not installed.

AppWorld's data was not within reach of those who wrote this: no task of its own was ever run.
"""

import asyncio
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from appworld_cases import ADD, DONE, LOG_IN, Models, make_world, next_code
from scripted import Scripted
from step_helpers import drive

from routers.data.catalogue import Member
from routers.environments.appworld.environment import HOW, AppWorldBenchmark
from routers.environments.protocol import Session
from routers.environments.react import ReActExecutor
from routers.pool import Pool, Retry, live_pool
from routers.tasks.step_routing.arguments import DifficultyRule
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import TASK, StepRoutingEnvironment
from routers.tasks.step_routing.profiles import read_profiles
from routers.tasks.step_routing.prompts import OBSERVATIONS
from srpo.types import CORRECT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppWorldBenchmark]:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPWORLD_ROOT", str(folder))
        made = AppWorldBenchmark()
        yield made
        made.close()


@pytest.mark.parametrize(
    ("task", "actions", "won"),
    [
        ("abc1234_1", [LOG_IN, ADD, DONE], True),
        ("abc1234_1", [DONE], False),
        ("abc1234_1", [LOG_IN, ADD, ADD, DONE], False),  # eggs twice
        ("abc1234_1", [LOG_IN, ADD, 'apis.supervisor.complete_task(answer="eggs")'], False),  # nobody asked
        ("abc1234_2", ["apis.supervisor.complete_task(answer=1)"], True),
        ("abc1234_2", ["apis.supervisor.complete_task(answer=2)"], False),
        ("abc1234_2", [LOG_IN, ADD, "apis.supervisor.complete_task(answer=1)"], False),  # nothing else may change
    ],
)
def test_the_goal_decides(benchmark: AppWorldBenchmark, task: str, actions: list[str], won: bool) -> None:
    episode = benchmark.make(task, 40)
    first = episode.reset()
    assert "Thursday, 2023-05-18 12:00" in first and first.endswith(f"Your task is to: {episode.task}")
    for action in actions:
        assert not episode.done and episode.score == 0.0
        said, done = episode.step(action)
        assert not said.startswith("Execution failed"), said
    assert done and episode.done and episode.steps == len(actions)
    assert episode.won is won and episode.score == float(won)


def test_what_was_reached_at_the_limit_counts(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make(
        "abc1234_1", 2
    )  # AppWorld evaluates what is there when the agent stops, for whatever reason
    episode.reset()
    assert episode.step(LOG_IN) == ("Shopping\n", False)
    assert episode.step(ADD) == ('{"message": "Note updated."}\n', True) and episode.won


def test_broken_code_costs_a_step_and_says_why(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_1", 40)
    episode.reset()
    for code, words in {
        "print(": "'(' was never closed",
        "1 / 0": "ZeroDivisionError",
        "": "No code available",
        "\0": "null bytes",
        "(" * 5000: "Execution failed",
        "import subprocess": "not allowed: subprocess",
        "exit()": "not allowed",
        "input()": "not allowed",
        "apis.simple_note.show_note(note_id=1)": "401",
        "apis.spotify.no_such_api()": "no_such_api",
        "raise SystemExit": "Execution failed",
        "print('\\ud800')": "surrogates not allowed",
        "print('\ud800')": "Execution failed",
    }.items():
        said, done = episode.step(code)
        assert words in said and not done, (code, said)
    assert len(episode.step("print('x' * 1_000_000)")[0]) == 100_000
    assert episode.steps == 14 and episode.step("print(1)") == ("1\n", False)


def test_appworld_stops_code_that_does_not_end(benchmark: AppWorldBenchmark) -> None:
    episode = benchmark.make("abc1234_1", 40)
    episode.reset()
    assert "timed out after 30 seconds" in episode.step("x = 1\nwhile True:\n    pass")[0]
    assert episode.step("print(x)") == ("1\n", False)


def test_a_model_behind_an_endpoint_completes_a_task(benchmark: AppWorldBenchmark) -> None:
    with Models() as server:
        member = Member("large", "x", 2.0, 8.0, base_url=server.url)
        pool = live_pool({"large": member}, agent_prompt="{query}", retry=Retry(attempts=1))
        session, executor, usd = Session(benchmark.make("abc1234_1", 40), "s"), ReActExecutor(pool, "large"), 0.0
        session.start()
        while not session.environment.done:
            act = asyncio.run(executor.act(session.view, 60.0))
            usd += act.cost
            session.take(act.action)
    assert session.environment.won and [step.action for step in session.view.steps] == [LOG_IN, ADD, DONE]
    assert usd == pytest.approx(sum(2 * p + 8 * c for p, c in server.usage) / 1e6)
    prompt = server.requests[-1]["messages"][-1]["content"]
    assert HOW in prompt and f"Action:\n```\n{LOG_IN}\n```\nObservation:\nShopping\n" in prompt


def test_one_command_trains_a_router(
    benchmark: AppWorldBenchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Profile, BoSFT, BoPO and evaluation, with both executors behind an endpoint."""
    from srpo.train import main

    with Models() as server:
        entry = {"descriptor": "x", "base_url": server.url, "max_tokens": 256}
        prices = {"small": (0.4, 1.6), "large": (2.0, 8.0)}
        members = [{"name": n, "price_in": i, "price_out": o, **entry} for n, (i, o) in prices.items()]
        (tmp_path / "catalogue.yaml").write_text(json.dumps({"members": members}))
        words = f"""--config {ROOT}/recipes/quickstart/bopo.yaml --output_dir {tmp_path}/out
            --catalogue {tmp_path}/catalogue.yaml --executors small large --observation progress
            --environment appworld --train_tasks train --train_limit 99 --heldout_tasks dev --heldout_limit 99
            --step_limit 5 --max_turns 5 --train_caps inf --heldout_caps inf 2 --profile_runs 2 --concurrency 8
            --sft_sweep 3 --sft_epochs 1 --max_steps 2 --per_device_train_batch_size 16
            --gradient_accumulation_steps 1 --logging_steps 1"""
        played = main(words.split())
    assert "bopo" in played.routers and "difficulty 2" in set(played.frame["family"])
    classes = {p.task: p.difficulty(DifficultyRule()) for p in read_profiles(tmp_path / "out" / "profiles.parquet")}
    assert classes == {"abc1234_1": "hard", "abc1234_2": "easy"}
    assert played.frame["violated"].sum() == 0
    said = capsys.readouterr().out
    assert said.count("'rollout/stop/lost': '0'") == 2 and said.count("'budget/violations': '0'") == 2


def test_a_budgeted_episode_with_two_members(benchmark: AppWorldBenchmark) -> None:
    members = {name: Member(name, "x", price, price) for name, price in (("small", 1.0), ("large", 5.0))}
    pool = Pool(members, {name: Scripted(functools.partial(next_code, name)) for name in members})
    executors = [ReActExecutor(pool, name) for name in members]
    environment = StepRoutingEnvironment(
        lambda row: benchmark.make(row[TASK], 40),
        executors,
        OBSERVATIONS["progress"].describe,
        Budget(2, "large_calls"),
        ["<small>", "<large>"],
    )
    played = drive(environment, {TASK: "abc1234_1"}, "s", lambda situation, names: names[-1])
    assert played.columns[CORRECT] == 1.0 and played.columns["members"] == ["large", "large", "small"]
    assert played.stop == "done" and played.columns["budget_violated"] == 0
