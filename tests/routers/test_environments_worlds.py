"""Environments of other libraries as agents that speak messages: verifiers, gymnasium, OpenEnv, BFCL by tool calls.

What cannot be installed beside this library is in a Python of its own (VERIFIERS_PYTHON, OPENENV_PYTHON): where there
is none, a stand-in of the package is behind the same process and the same wire.
"""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps
import yaml
from chat_server import ChatServer, Said, usage, whole

from routers.data.catalogue import Member
from routers.environments.bfcl import CATEGORIES, MORE_FUNCTIONS, load_bfcl
from routers.environments.messages import verifiers
from routers.environments.messages.agent import AGENTS, agent_of
from routers.environments.messages.environment import MessagesBenchmark, MessagesEnvironment, answer
from routers.environments.messages.games import GymAgent
from routers.environments.messages.members import ScriptedMember
from routers.environments.messages.named import Scale, named
from routers.environments.protocol import GameError
from routers.environments.tool_calls import read_calls
from routers.tasks.step_routing import world as step_world
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.player import Job as Play
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.rules import always_large
from srpo import train
from srpo.plan import plan
from srpo.run.signals import HEARD
from srpo.types import CORRECT, COST, LOST

WORLDS = Path(__file__).resolve().parents[1] / "support" / "worlds"
CATALOGUE = ("--catalogue", str(WORLDS.parents[2] / "recipes" / "catalogues" / "gpt41_tools.yaml"))


@pytest.fixture
def agents() -> Iterator[dict[str, Any]]:
    before = dict(AGENTS)
    yield AGENTS
    AGENTS.clear()
    AGENTS.update(before)


def play(agent: Any, task: str, *said: str | Mapping[str, Any] | None, limit: int = 20) -> MessagesEnvironment:
    """An episode of an agent whose calls are answered so; None: the member failed."""
    made = MessagesEnvironment(agent, f"agent/{task}", "kind", limit)
    made.reset()
    for text in said:
        message = {"role": "assistant", "content": text} if isinstance(text, str) else text
        made.step("" if message is None else answer("m", message))
    return made


def shown(made: MessagesEnvironment) -> str:
    """What the agent was told last."""
    return str(made.request["messages"][-1]["content"])


class Speaker(ScriptedMember):
    """SCRIPTED. Says what `speak` makes of the last message."""

    def __init__(self, name: str, speak: Callable[[str], str]) -> None:
        super().__init__(Member(name, "x", 1.0, 2.0, max_tokens=50))
        self._speak = speak

    def say(self, request: Mapping[str, Any], seed: str) -> dict[str, Any]:
        return {"role": "assistant", "content": self._speak(str(request["messages"][-1]["content"]))}


def drive(agent: str, tasks: Any, speak: Callable[[str], str], cap: float | None = None, seconds: float = 60.0) -> Any:
    """Episodes of an agent at the same time, by a rule that always asks the large one."""
    benchmark = MessagesBenchmark()
    benchmark.tasks(f"{agent}/train")
    environment = StepRoutingEnvironment(
        lambda row: benchmark.make(row["task"], 9),
        [Speaker("small", lambda _: "no"), Speaker("large", speak)],
        OBSERVATIONS["signs"].describe,
        steps.Budget(None, "usd"),
        waits=True,
    )
    jobs = [Play(task, {"task": f"{agent}/{task}", "cap": cap}, task, always_large) for task in tasks]
    return steps.drive_all(environment, jobs, seconds=seconds)


def test_names_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(verifiers.PYTHON, raising=False)
    assert named("repairs") is None and named("mine:x") is None
    for name, told in (
        ("verifiers:x", "verifiers:x needs VERIFIERS_PYTHON"),
        ("verifiers:x?worst=2", "worst=2, best=1.0: give two numbers"),
        ("verifiers:x?best=much", "give two numbers"),
        ("verifiers:x?a", "write verifiers:WHAT"),
        ("verifiers:x?a=[", "write verifiers:WHAT"),
        ("openenv:127.0.0.1:9", "no OpenEnv server answers at http://127.0.0.1:9 "),
    ):
        with pytest.raises(GameError, match=told):
            named(name)
    with pytest.raises(GameError, match=r"there are repairs, alfworld, .*, verifiers:\.\.\."):
        agent_of("verifier:x")
    assert Scale(-2, 2).score(1) == 0.75 and Scale().score(1.0) == 1.0
    for reward in (1.5, -0.1, float("nan"), float("inf")):
        with pytest.raises(GameError, match=r"a reward of \S+ is not between worst=0 and best=1"):
            Scale().score(reward)


# gymnasium


def test_gymnasium_s_own_environments() -> None:
    """A lake whose way is known, by hand; what is no action is told; texts that are not numbers cost a step."""
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install gymnasium")
    lake = agent_of("gymnasium:FrozenLake-v1?is_slippery=false")
    assert list(lake.tasks("test", 2).items())[1][0] == "200001" and len(lake.tasks("train")) == 2000
    made = play(lake, "0", "Thought: down.\nAction: 1", "Action: north", "Action: 7")
    assert "An action is a whole number from 0 to 3" in made.request["messages"][0]["content"]
    assert [m["content"] for m in made.request["messages"][1:] if m["role"] == "user"] == [
        "0",
        "4",
        "Error: An action is a whole number from 0 to 3, and nothing else.",
        "Error: An action is a whole number from 0 to 3, and nothing else.",
    ]
    for step in "12122":
        text, done = made.step(answer("m", {"role": "assistant", "content": step}))
    assert (text, done, made.score, made.steps) == ("", True, 1.0, 8)
    drowned = play(lake, "0", "1", "2")
    assert drowned.done and drowned.score == 0.0
    with pytest.raises(GameError, match="there is no split 'dev'; there are train, validation, test"):
        MessagesBenchmark().tasks("gymnasium:FrozenLake-v1?is_slippery=false/dev")
    # A seed is a world; rewards that add up to more than 1 need a scale.
    pole = agent_of("gymnasium:CartPole-v1?best=500")
    first = [shown(play(pole, task)) for task in ("0", "1", "0")]
    assert first[0] == first[2] != first[1]
    pushed = MessagesEnvironment(pole, "agent/0", "kind", 100)
    pushed.reset()
    while not pushed.done:
        pushed.step(answer("m", {"role": "assistant", "content": "1"}))
    assert pushed.score == pytest.approx(pushed.steps / 500) and 5 < pushed.steps < 20
    with pytest.raises(GameError, match=r"a reward of .* is not between worst=0 and best=1: say in the name"):
        play(agent_of("gymnasium:CartPole-v1"), "0", *["1"] * 20)
    for name, told in (
        ("gymnasium:Pendulum-v1", "actions are Box"),
        ("gymnasium:Nowhere-v1", "cannot be made: .*Nowhere"),
        ("gymnasium:CartPole-v1?color=red", "cannot be made: .*color"),
    ):
        with pytest.raises(GameError, match=told):
            named(name)


class Steps:
    """In gymnasium's manner: says its seed; `go` is a step of three, other words do as they say."""

    def __init__(self, task: str) -> None:
        self.at = 0

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.seed = seed
        return f"seed {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "raise":
            raise OSError("the world broke")
        if action == "hang":
            time.sleep(20)
        self.at += 1
        reward = {"go": 1 / 3, "nan": float("nan")}.get(action, 0.0)
        return f"seed {self.seed}, {action}", reward, False, self.at == 3, {}

    def close(self) -> None: ...


def test_worlds_that_break_cost_themselves(agents: Any) -> None:
    """One raises, one hangs, one scores NaN: each is lost, with its cause; the others go on, and nothing mixes."""
    tasks = {str(n): "steps" for n in range(8)}
    agents["mine"] = GymAgent(Steps, lambda split, count: tasks, "Go.", str.strip, waits=True)
    acts = {"1": "raise", "3": "hang", "5": "nan"}

    def speak(last: str) -> str:
        return acts.get(last.removeprefix("seed ").partition(",")[0], "go")

    found = dict(zip(tasks, drive("mine", tasks, speak, seconds=3.0), strict=True))
    lost = {task: driven.columns[LOST] for task, driven in found.items() if driven.columns[LOST]}
    assert set(lost) == set(acts)
    assert "OSError: the world broke" in lost["1"] and "the agent's score is nan" in lost["5"]
    assert "3 s" in lost["3"] or "deadline" in lost["3"] or "TimeoutError" in lost["3"]
    good = [driven for task, driven in found.items() if task not in acts]
    assert [d.columns[CORRECT] for d in good] == [pytest.approx(1.0)] * 5
    assert all(driven.columns[COST] > 0 for driven in found.values()), "a lost episode's money is not lost"


# verifiers


def folder_of(
    module: str, stand_in: str, kind: str, wanted: Callable[[str], bool], made: pytest.TempPathFactory
) -> Iterator[None]:
    """VERIFIERS_PYTHON, and a folder with a module of environments; where `kind` is "verifiers", with the real one."""
    folder, real = made.mktemp("verifiers"), os.environ.get(verifiers.PYTHON)
    if kind == "verifiers" and not (real and wanted(installed(real))):
        pytest.skip("VERIFIERS_PYTHON names no Python with verifiers of this API")
    (folder / module).write_text((WORLDS / module).read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if kind == "stand-in":
            (folder / "verifiers").symlink_to(WORLDS / stand_in / "verifiers")
            patch.setenv(verifiers.PYTHON, sys.executable)
        before = dict(AGENTS)
        yield
        AGENTS.clear()
        AGENTS.update(before)
        verifiers.worker(os.environ[verifiers.PYTHON]).close()


def installed(python: str) -> str:
    said = [python, "-Ic", "from importlib.metadata import version; print(version('verifiers'))"]
    return subprocess.run(said, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=["stand-in", "verifiers"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from folder_of("tiny_env.py", "stand_in", request.param, lambda v: v < "0.4", tmp_path_factory)


@pytest.fixture(scope="module", params=["stand-in", "verifiers"])
def tasksets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from folder_of("tiny_tasks.py", "stand_in_tasksets", request.param, lambda v: v >= "0.4", tmp_path_factory)


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


def test_environments_of_verifiers(tiny: None) -> None:
    """Requests, tools, turns and the rubric's reward, by hand; a failed member, the step limit, and what breaks."""
    benchmark = MessagesBenchmark()
    twice = "verifiers:tiny-env?kind=twice"
    assert list(benchmark.tasks(f"{twice}/eval").values()) == ["tiny-env"] * 2
    assert list(benchmark.tasks(f"{twice}/train", 2)) == [f"{twice}/train-0", f"{twice}/train-1"]
    with pytest.raises(GameError, match="there is no split 'eval'; there are train"):
        benchmark.tasks("verifiers:tiny-env/eval")
    single = agent_of("verifiers:tiny-env")
    assert play(single, "train-3", "it is 3").score == 1.0 and play(single, "train-3", "it is 4").score == 0.0
    made = play(agent_of(twice), "train-4", "it is 4")
    said = [(m["role"], m["content"]) for m in made.request["messages"]]
    assert said == [("user", "say 4"), ("assistant", "it is 4"), ("user", "once more: 4")]
    made.step(answer("m", {"role": "assistant", "content": "who knows"}))
    assert made.done and made.score == 0.5
    tool = agent_of("verifiers:tiny-env?kind=tool")
    made = play(tool, "train-5", call("add", a=2, b=3))
    assert made.request["tools"][0]["function"]["name"] == "add"
    assert (made.request["messages"][-1]["role"], shown(made)) == ("tool", "5")
    made.step(answer("m", {"role": "assistant", "content": "5"}))
    assert made.done and made.score == 0.5, "the rubric takes the mean over both answers"
    # A member that failed ends verifiers' rollout, and so does the limit: what is there is scored, without a retry.
    assert play(agent_of(twice), "train-1", "1", None).score == 1.0
    assert play(agent_of(twice), "train-1", "1", limit=1).score == 1.0
    assert play(single, "train-1", None).score == 0.0
    assert play(agent_of("verifiers:tiny-env?worth=4&worst=-4&best=4"), "train-1", "0").score == 0.5
    for name, told in (
        ("tiny-env?kind=mixed", "the agent raised RuntimeError: verifiers: RuntimeError: the world broke"),
        ("tiny-env?worth=4", "a reward of 4 is not between worst=0 and best=1"),
        ("tiny-env?kind=nan", "a reward of nan is not between"),
        ("tiny-env?kind=broken", "Error calling reward function broken: the rubric broke"),
    ):
        with pytest.raises(RuntimeError, match=told):
            play(agent_of(f"verifiers:{name}"), "train-2", "2", "2")
    for name in ("nowhere", "tiny-env?colour=red", "tiny-env?kind=group"):
        with pytest.raises(GameError, match=r"verifiers: \w+: .*(nowhere|colour|scores groups of rollouts)"):
            benchmark.tasks(f"verifiers:{name}/train")


def test_many_conversations_of_verifiers_within_their_budgets(tiny: None) -> None:
    """At the same time, each with its own number; a third of a call's price more is not spent."""
    tasks = [f"train-{n}" for n in range(24)]
    found = drive("verifiers:tiny-env?kind=twice&rows=24", tasks, lambda last: last.split()[-1])
    assert [d.columns[CORRECT] for d in found] == [1.0] * 24 and all(d.columns["calls"] == 2 for d in found)
    first = max(d.columns[COST] for d in found)
    process: Any = verifiers.worker(os.environ[verifiers.PYTHON])._process
    for number in HEARD:  # what a run is told by its terminal or by Slurm is not for its worlds
        process.send_signal(number)
    capped = drive("verifiers:tiny-env?kind=twice&rows=24", tasks, lambda last: last.split()[-1], cap=1.5e-4)
    assert first < 1.5e-4 and all(d.columns[COST] <= 1.5e-4 and not d.columns[LOST] for d in capped)
    assert process.poll() is None


def test_tasksets_of_verifiers(tasksets: None) -> None:
    """verifiers 0.4: tasks, requests, rewards; a failed call ends the episode, is not repeated, and what is there is
    scored; arguments, and what is refused."""
    benchmark = MessagesBenchmark()
    assert list(benchmark.tasks("verifiers:tiny-tasks?rows=2/tasks").values()) == ["tiny-tasks"] * 2
    with pytest.raises(GameError, match="there is no split 'train'; there are tasks"):
        benchmark.tasks("verifiers:tiny-tasks/train")
    agent = agent_of("verifiers:tiny-tasks")
    made = play(agent, "tasks-3", "it is 3")
    assert made.score == 1.0 and [m["content"] for m in made.request["messages"]] == ["say 3"]
    assert play(agent, "tasks-3", "it is 4").score == 0.0
    assert play(agent, "tasks-3", None).score == 0.0, "a second call would be asked of a game that has no answer to it"
    assert play(agent_of("verifiers:tiny-tasks?worth=4&worst=-4&best=4"), "tasks-1", "0").score == 0.5
    for name, told in (("kind=broken", "TaskError: .*the rubric broke"), ("worth=4", "a reward of 4 is not between")):
        with pytest.raises(RuntimeError, match=told):
            play(agent_of(f"verifiers:tiny-tasks?{name}"), "tasks-2", "2")
    for name, told in (
        ("nowhere", "nowhere"),
        ("tiny-tasks?colour=red", "(?i)extra inputs are not permitted"),
        ("tiny-tasks?kind=endless", "makes tasks for ever"),
        ("tiny-tasks?env.id=best-of-n", "has several agents"),
        ("tiny-tasks?id=other", "leave it out"),
    ):
        with pytest.raises(GameError, match=told):
            benchmark.tasks(f"verifiers:{name}/tasks")


def test_a_process_of_verifiers_that_dies(tiny: None) -> None:
    """Open episodes are lost, with its last words, at once; the next one finds a new process."""
    agent = agent_of("verifiers:tiny-env")
    agent.tasks("train")
    process = agent._worker._process  # type: ignore[attr-defined]
    made = MessagesEnvironment(agent, "agent/train-1", "kind", 5)
    made.reset()
    process.kill()
    with pytest.raises(RuntimeError, match="verifiers' process has ended; its last words: "):
        made.step(answer("m", {"role": "assistant", "content": "1"}))
    assert play(agent, "train-1", "1").score == 1.0


def test_a_python_that_has_none(tmp_path: Path) -> None:
    nothing = verifiers.Worker(str(tmp_path / "python"))
    with pytest.raises(GameError, match=r"VERIFIERS_PYTHON=.*python cannot be run: No such file"):
        nothing.ask("tasks", "x", {})
    ours = verifiers.Worker(sys.executable)
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'verifiers'"):
        ours.ask("tasks", "x", {})
    ours.close()


def test_plans_of_the_recipes(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, calls and money of the recipes for GPUs; nothing is asked and nothing is written."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    name, parts = "Qwen2.5-1.5B-Instruct/bopo/verifiers", "verifiers:tiny-env?kind=twice&rows=40"
    said = plan([name, "--train_tasks", f"{parts}/train", "--heldout_tasks", f"{parts}/eval", *CATALOGUE], 8)

    assert "training rows        40\n" in said and "2 executors, live; 2 held-out tasks\n" in said
    assert "16 rows x 8 completions" in said and "128 completions" in said
    assert f"at most 20 an episode, {128 * 20:,} a step, {150 * 128 * 20:,} in training, " in said
    assert "at most $" in said and "; max_cost_usd stops at $500\n" in said
    with pytest.raises(GameError, match=r"verifiers:YOUR-ENV/eval: .*YOUR.ENV"):
        plan([name, *CATALOGUE])


@pytest.mark.slow
def test_two_steps_of_training_in_an_environment_of_verifiers(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer, a tiny policy, two members on loopback; every third task breaks: its rollouts count as lost."""

    monkeypatch.setattr(step_world, "PAUSE", 0.1)

    def member(right: bool) -> ChatServer:
        def respond(request: dict[str, Any]) -> Said:
            text = str(request["messages"][-1]["content"]).split()[-1] if right else "no idea"
            return Said(body=whole({"content": text}, usage(20, 10)))

        return ChatServer(respond)

    with member(False) as small, member(True) as large:
        members = [
            {
                "name": name,
                "descriptor": "x",
                "price_in": usd,
                "price_out": usd,
                "base_url": server.url,
                "max_tokens": 20,
            }
            for name, usd, server in (("small", 1.0, small), ("large", 9.0, large))
        ]
        (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump({"members": members}))
        recipe = {
            "task": "step_routing", "objective": "bopo", "model_name_or_path": "tiny",
            "output_dir": str(tmp_path / "out"), "environment": "messages",
            "train_tasks": "verifiers:tiny-env?kind=mixed/train",
            "heldout_tasks": ["verifiers:tiny-env?kind=twice/eval"],
            "executors": ["small", "large"], "executor_usd": [0, 0], "catalogue": str(tmp_path / "catalogue.yaml"),
            "observation": "digest", "step_limit": 4, "profile_runs": 1, "sft_sweep": 2, "sft_epochs": 1,
            "num_generations": 4, "per_device_train_batch_size": 16, "max_turns": 4, "max_completion_length": 400,
            "max_observation_tokens": 64, "max_steps": 2, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1,
            "activation_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "max_lost_share": 0.9,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        played = train.main(["--config", str(tmp_path / "recipe.yaml")])
    frame = played.frame
    assert set(frame.loc[frame["router"] == "always-large", "score"]) == {1.0}
    assert set(frame.loc[frame["router"] == "always-small", "score"]) == {0.0}
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    lost = [entry["rollout/stop/lost"] for entry in logs if "rollout/stop/lost" in entry]
    assert len(lost) == 2 and sum(lost) >= 0.5 and max(lost) < 1, "both broken tasks are among the first six"


# OpenEnv


@pytest.fixture(params=["stand-in", "openenv"])
def server(request: pytest.FixtureRequest) -> str:
    """The Python that a server is run by."""
    if request.param == "stand-in":
        return sys.executable
    if not (python := os.environ.get("OPENENV_PYTHON")):
        pytest.skip("OPENENV_PYTHON names no Python with openenv")
    return python


@contextmanager
def guess(python: str, port: Path, *words: str) -> Iterator[str]:
    """The name of the agent: a server on loopback, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen([python, str(WORLDS / "openenv_server.py"), str(port), *words], env=kept)
    end = time.monotonic() + 240
    while not port.exists():
        assert server.poll() is None and time.monotonic() < end, "the server did not start"
        time.sleep(0.05)
    name, before = f"openenv:127.0.0.1:{port.read_text()}", dict(AGENTS)
    while True:  # a port that listens is not a server that answers
        try:
            AGENTS[name] = named(name)  # type: ignore[assignment]
            break
        except GameError:
            assert time.monotonic() < end
    try:
        yield name
    finally:
        AGENTS.clear()
        AGENTS.update(before)
        server.kill()
        server.wait()


def test_environments_behind_openenv_s_server(server: str, tmp_path: Path) -> None:
    """Every episode is a session of its own; observations, texts as actions, rewards and ends, by hand."""
    with guess(server, tmp_path / "port") as name:
        check_texts(name)


def test_tools_behind_openenv_s_server(server: str, tmp_path: Path) -> None:
    """Tools are offered as `tools`; calls, results, errors, rewards and ends, by hand."""
    with guess(server, tmp_path / "port", "tools") as name:
        agent = agent_of(name)
        made = play(agent, "100003", call("say", message="4"))
        assert [m["role"] for m in made.request["messages"]] == ["system", "user", "assistant", "tool"]
        assert made.request["messages"][1]["content"] == "say 3" and shown(made) == "you said 4"
        [tool] = made.request["tools"]
        assert tool["function"]["name"] == "say" and tool["function"]["parameters"]["required"] == ["message"]
        for bad, told in ((call("say", message="boom"), "the world broke"), (call("say", massage="3"), "massage")):
            made.step(answer("m", bad))
            assert shown(made).startswith("Error: ") and told in shown(made)
        bad["tool_calls"][0]["function"]["arguments"] = "{"
        made.step(answer("m", bad))
        assert shown(made) == "Error: the arguments are not JSON"
        assert made.step(answer("m", call("say", message="3"))) == ("", True) and made.score == 1.0
        assert play(agent, "7", call("say", message="1"), "I give up.").score == 0.0


def check_texts(name: str) -> None:
    agent = agent_of(name)
    made = play(agent, "100003", "Action: 4")
    assert [m["content"] for m in made.request["messages"] if m["role"] != "assistant"][1:] == ["say 3", "you said 4"]
    assert "An action is a text: what you say" in made.request["messages"][0]["content"]
    assert made.step(answer("m", {"role": "assistant", "content": "x" * 30}))[1] is False
    assert shown(made) == "Error: message: String should have at most 20 characters"
    made.step(answer("m", {"role": "assistant", "content": "Action: 3"}))
    assert made.done and made.score == 1.0 and made.steps == 3
    assert play(agent, "7", "1", "2", "3").score == 0.0
    with pytest.raises(RuntimeError, match="the server answered EXECUTION_ERROR: the world broke"):
        play(agent, "7", "boom")
    acts = {"2": "boom", "5": "hang"}
    found = drive(name, map(str, range(8)), lambda last: acts.get(last[-1], last[-1]), seconds=5.0)
    assert [number for number, driven in enumerate(found) if driven.columns[LOST]] == [2, 5]
    assert [d.columns[CORRECT] for d in found if not d.columns[LOST]] == [1.0] * 6


# BFCL


def test_bfcl_by_tool_calls(agents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right calls score 1 in every category; what goes wrong in a call is its result; words too early score 0."""
    pytest.importorskip("bfcl_eval", reason="BFCL is not installed: pip install --no-deps bfcl-eval mpmath")
    agent = agent_of("bfcl")
    for part in CATEGORIES:
        agent.tasks(part, 20)
        for task in load_bfcl(part)[:20]:
            made = play(agent, task.id, limit=99)
            for turn, calls in enumerate(task.gold):
                tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in made.request["tools"]}
                for number, names in task.later.items():
                    assert not names or (names[0] in tools) == (turn >= number)
                assert (shown(made) == MORE_FUNCTIONS) == (turn in task.later)
                for text in calls:
                    made.step(answer("m", by_name(text, tools)))
                made.step(answer("m", {"role": "assistant", "content": "Done."}))
            assert made.done and made.score == 1.0, task.id
    task = load_bfcl("base")[0]
    made = play(agent, task.id, call("cd", folder="document"))
    assert [m["role"] for m in made.request["messages"]] == ["user", "assistant", "tool"]
    assert shown(made) == '{"current_working_directory": "document"}'
    [mv] = [t["function"] for t in made.request["tools"] if t["function"]["name"] == "mv"]
    assert mv["parameters"]["type"] == "object" and mv["parameters"]["properties"]["source"]["type"] == "string"
    bad = call("cd", folder="x")
    for arguments, told in (("{", "Error during execution: "), ("[1]", "the arguments are not a JSON object")):
        bad["tool_calls"][0]["function"]["arguments"] = arguments
        made.step(answer("m", bad))
        assert told in shown(made)
    for name in ("_load_scenario", "cp", "exit"):
        made.step(answer("m", call(name)))
        assert shown(made) == f"Error during execution: name '{name}' is not defined"
    assert made.step(answer("m", {"role": "assistant", "content": "I am done."})) == ("", True) and made.score == 0.0
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    said = plan(["Qwen2.5-1.5B-Instruct/bopo/bfcl", *CATALOGUE])
    assert "training rows        111\n" in said and "16 rows x 8 completions" in said and "178 held-out tasks" in said


def by_name(text: str, tools: Mapping[str, Any]) -> dict[str, Any]:
    """A call that the package wrote as text, as a model with tools says it."""
    [parsed] = read_calls(text)
    name = parsed.func.id  # type: ignore[attr-defined]
    given = dict(zip(tools[name]["properties"], map(ast.literal_eval, parsed.args), strict=False))
    return call(name, **given, **{word.arg or "": ast.literal_eval(word.value) for word in parsed.keywords})
