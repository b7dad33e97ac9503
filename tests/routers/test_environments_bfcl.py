"""BFCL's multi-turn tasks; what needs the package is skipped where it is not installed."""

import ast
import asyncio
from typing import Any

import pytest
from openai_server import Fault, OpenAIServer
from step_helpers import drive

from routers.data.catalogue import Member
from routers.environments.bfcl import CATEGORIES, INSTRUCTION, MORE_FUNCTIONS, SPLITS, Bfcl, load_bfcl
from routers.environments.protocol import GameError, Session
from routers.environments.react import ReActExecutor
from routers.environments.registry import benchmark
from routers.environments.tool_calls import call_tool, read_calls
from routers.pool import Retry, live_pool
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.rules import always_large, always_small
from srpo.types import CORRECT

INSTALL = "BFCL is not installed: pip install --no-deps bfcl-eval mpmath"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[cd(folder='a'), ls()]", ["cd", "ls"]),
        (" ls(a=True) ", ["ls"]),
        ("[]", []),
        ("Done.", []),
        ("[ls(), 3]", []),  # all or nothing
        ("[].append(ls())", []),
        ("().__class__.__base__()", []),
        ("(lambda: 1)()", []),
        ("import os", []),
        ("[" * 5000, []),
        ("\x00", []),
        ("", []),
    ],
)
def test_only_plain_calls_are_calls(text: str, names: list[str]) -> None:
    assert [call.func.id for call in read_calls(text) if isinstance(call.func, ast.Name)] == names


class Tool:
    """Two methods for the world, one that is not, and things that are no methods."""

    path = "/"
    kind = str

    def add(self, a: int, b: int = 1) -> dict[str, int]:
        return {"sum": a + b}

    def fail(self) -> None:
        raise KeyError("no such file")

    def _secret(self) -> str:
        return "hidden"


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("add(1)", '{"sum": 2}'),
        ("add(a=1, b=-3)", '{"sum": -2}'),
        ("add()", "Error during execution: Tool.add() missing 1 required positional argument: 'a'"),
        ("add(add(1))", "Error during execution: malformed node or string on line 1: <ast.Call object"),
        ("add(**{'a': 1})", "Error during execution: Tool.add() missing 1"),
        ("fail()", "Error during execution: 'no such file'"),
        ("_secret()", "Error during execution: name '_secret' is not defined"),
        ("__init__()", "Error during execution: name '__init__' is not defined"),
        ("path()", "Error during execution: name 'path' is not defined"),
        ("kind(1)", "Error during execution: name 'kind' is not defined"),
        ("print(1)", "Error during execution: name 'print' is not defined"),
    ],
)
def test_calls_reach_public_methods_with_literal_arguments_only(call: str, result: str) -> None:
    (parsed,) = read_calls(call)
    assert call_tool({"Tool": Tool()}, parsed, ()).startswith(result)


def test_excluded_methods_are_not_there() -> None:
    (parsed,) = read_calls("add(1)")
    assert call_tool({"Tool": Tool()}, parsed, ("add",)) == "Error during execution: name 'add' is not defined"


def test_unsupported_categories_are_named() -> None:
    with pytest.raises(GameError, match="'live' is not supported"):
        load_bfcl("live")


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_right_calls_solve_all_200_tasks(category: str) -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    tasks = load_bfcl(category)
    assert len(tasks) == 200
    for task in tasks:
        episode = Bfcl(task, limit=len(task.walkthrough))
        episode.reset()
        for action in task.walkthrough:
            assert not episode.done
            episode.step(action)
        assert episode.won and episode.score == 1.0 and episode.done, task.id


def test_a_conversation_and_its_mistakes() -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    task = load_bfcl()[0]  # make a folder, move a file; grep; sort; move and compare
    first = Bfcl(task)
    said = first.reset()
    assert '{"name": "mv"' in said and said.endswith(task.turns[0]) and '{"name": "cp"' not in said
    assert first.step("[cd(folder='document')]") == ('{"current_working_directory": "document"}', False)
    assert first.step("[cd(folder='nowhere')]")[0].startswith('{"error"')
    assert first.step("I am done.")[1]  # nothing was moved: the state is not what it has to be
    assert not first.won and first.score == 0.0
    with pytest.raises(GameError, match="after the end"):
        first.step("[ls()]")
    second = Bfcl(task)
    second.reset()
    second.step(task.walkthrough[0])
    assert second.step("That is done.") == (task.turns[1], False)


def test_functions_that_come_later() -> None:
    """By the data and the words of the package."""
    prompts = pytest.importorskip("bfcl_eval.constants.default_prompts", reason=INSTALL)
    task = load_bfcl("miss_func")[0]  # sort comes in the fourth turn, whose user says nothing else
    assert task.turns[3] == MORE_FUNCTIONS == prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC
    assert all(MORE_FUNCTIONS not in task.turns for part in CATEGORIES[:3] for task in load_bfcl(part))
    made = Bfcl(task)
    assert '{"name": "sort"' not in made.reset()
    said = [made.step(action)[0] for action in task.walkthrough]
    [told] = [text for text in said if text.endswith(MORE_FUNCTIONS)]
    assert told.startswith('{"name": "sort"') and told.count('{"name": ') == 1 and made.won


@pytest.mark.parametrize(
    "call", ["_load_scenario({})", "cp('a','b')", "exit()", "open('x')", "root()", "long_context()"]
)
def test_nothing_but_the_tools_of_the_task_can_be_called(call: str) -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    episode = Bfcl(load_bfcl()[0])
    episode.reset()
    name = call.split("(")[0]
    assert episode.step(f"[{call}]")[0] == f"Error during execution: name '{name}' is not defined"


def test_arguments_are_literals() -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    episode = Bfcl(load_bfcl()[0])
    episode.reset()
    assert episode.step("[cd(folder=__import__('os').getcwd())]")[0].startswith(
        "Error during execution: malformed node"
    )


def test_the_limit_ends_a_conversation() -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    episode = Bfcl(load_bfcl()[0], limit=2)
    episode.reset()
    assert [episode.step("[ls()]")[1] for _ in range(2)] == [False, True]
    assert not episode.won


def test_a_model_behind_an_endpoint_solves_a_conversation() -> None:
    """Every way in which models write an action, and an endpoint that fails: the user's turn must not end by it."""
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    task = load_bfcl()[0]
    ways = (
        "Thought: so be it.\nAction: {}",
        "Action:\n```python\n{}\n```\nObservation: all right",
        "{}",
        "I call\n```\n{}\n```",
    )
    with OpenAIServer() as server:
        member = Member("m", "x", 2.0, 8.0, base_url=server.url)
        pool = live_pool({"m": member}, agent_prompt="{query}", retry=Retry(attempts=1))
        executor, session = ReActExecutor(pool, "m"), Session(Bfcl(task), "s")
        session.start()

        async def episode() -> None:
            for number, action in enumerate(task.walkthrough):
                server.reply = ways[number % len(ways)].format(action)
                server.faults = [Fault(status=500)] if number == 2 else []
                for _ in range(1 + (number == 2)):
                    bound = executor.bound(session.view)
                    act = await executor.act(session.view, 5.0)
                    assert act.cost <= bound
                    session.take(act.action)
            await pool.aclose()

        asyncio.run(episode())
    assert session.environment.won and session.environment.steps == len(task.walkthrough) + 1
    assert (session.view.steps[2].action, session.view.steps[2].observation) == ("", "Nothing happens.")
    prompt = server.requests[-1]["messages"][0]["content"]
    assert INSTRUCTION in prompt and '{"name": "mv"' in prompt and "Possible commands" not in prompt
    assert all(turn in prompt for turn in task.turns)
    assert f"Action:\n```\n{task.walkthrough[0]}\n```\nObservation:\n{session.view.steps[0].observation}" in prompt


def test_the_split_is_ours_and_the_same_in_all_categories() -> None:
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    made = benchmark("bfcl")
    numbers = {}
    for category in CATEGORIES:
        parts = {split: made.tasks(f"{category}:{split}") for split in SPLITS}
        assert {**parts["train"], **parts["heldout"]} == made.tasks(category) and len(made.tasks(category)) == 200
        numbers[category] = {name.rsplit("_", 1)[1] for name in parts["heldout"]}
        assert len(numbers[category]) == 89 and len(parts["train"]) == 111
    assert all(numbers[category] == numbers["base"] for category in CATEGORIES)
    assert list(made.tasks("base:train", 3)) == list(made.tasks("base:train"))[:3]
    with pytest.raises(GameError, match=r"no part 'base:test'; there are base\[:train\|heldout\], long_context"):
        made.tasks("base:test")
    with pytest.raises(GameError, match="nothing_1: no part of BFCL with it was listed"):
        made.make("nothing_1", 5)


def test_two_models_behind_an_endpoint_play_a_part_of_the_suite() -> None:
    """The large one knows the right calls, the small one says it is done; a routing rule picks them step by step."""
    pytest.importorskip("bfcl_eval", reason=INSTALL)
    made = benchmark("bfcl")
    names = list(made.tasks("base:heldout", 3))

    def reply(request: dict[str, Any]) -> str:
        prompt = request["messages"][-1]["content"]
        if request["model"] == "small":
            return "Thought: easy.\nAction: I am done."
        task = next(task for name in names if (task := made.make(name, 9)._task).turns[0] in prompt)
        return f"Action: {task.walkthrough[prompt.count('Observation:')]}"

    with OpenAIServer(answer=reply) as server:
        members = {
            name: Member(name, "x", usd, usd, base_url=server.url) for name, usd in (("small", 1), ("large", 9))
        }
        pool = live_pool(members, agent_prompt="{query}")
        environment = StepRoutingEnvironment(
            lambda row: made.make(row["task"], 40), [ReActExecutor(pool, name) for name in members],
            OBSERVATIONS["verbose"].describe, ledger=pool.ledger,
        )  # fmt: skip
        score = {
            rule: [drive(environment, {"task": name}, "s", rule).columns[CORRECT] for name in names]
            for rule in (always_small, always_large)
        }
    assert score == {always_small: [0.0] * 3, always_large: [1.0] * 3}
    prices = {"small": 1e-6, "large": 9e-6}
    billed = sum(sum(u) * prices[r["model"]] for r, u in zip(server.requests, server.usage, strict=True))
    assert environment.spent_usd() == pytest.approx(billed)
