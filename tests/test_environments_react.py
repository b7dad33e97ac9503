"""Pool members as executors: on a real server, by what they say, and actions read out of free text."""

import asyncio

import pytest
from alfworld_problem import game
from openai_server import Fault, OpenAIServer

from routers.catalogue import Member
from routers.environments.alfworld import AlfWorld
from routers.environments.protocol import Act, Session, play
from routers.environments.react import INSTRUCTION, ReActExecutor, read_action
from routers.pool import Pool, Retry, live_pool
from routers.pool.scripted import Scripted


def test_a_pool_member_on_a_real_server_plays_by_what_it_says() -> None:
    with OpenAIServer() as server:
        member = Member("large", "x", 2.0, 8.0, base_url=server.url)
        pool = live_pool({"large": member}, agent_prompt="{query}", retry=Retry(attempts=1))
        executor = ReActExecutor(pool, "large")
        session = Session(AlfWorld(game(), limit=5), "s")
        session.start()

        async def episode() -> list[Act]:
            acts = []
            for reply in (
                "Thought: the apple is there.\nAction: Go to the countertop 1.",
                "broken",
                "Action: take apple 1 from countertop 1",
            ):
                server.reply = reply
                server.faults = [Fault(status=500)] if reply == "broken" else []
                bound = executor.bound(session.view)
                acts.append(await executor.act(session.view, 5.0))
                assert acts[-1].cost <= bound
                session.take(acts[-1].action)
            await pool.aclose()
            return acts

        acts = asyncio.run(episode())
    assert [act.action for act in acts] == ["go to countertop 1", "", "take apple 1 from countertop 1"]
    assert acts[1].reply.error is not None and acts[1].reply.error.startswith("server error")
    assert session.view.steps[1].observation == "Nothing happens."
    assert session.environment.state.held.name == "apple 1"
    # What was charged is what the server counted, at 2 and 8 USD per million.
    assert [act.cost for act in (acts[0], acts[2])] == pytest.approx([(2 * p + 8 * c) / 1e6 for p, c in server.usage])
    first, last = (request["messages"][0]["content"] for request in (server.requests[0], server.requests[2]))
    assert first.startswith(INSTRUCTION) and "Your task is to: put some apple on microwave." in first
    assert "> go to countertop 1\nYou arrive at countertop 1." in last and "take knife 1 from countertop 1;" in last


def test_a_member_that_reads_its_prompt_wins_the_game() -> None:
    def reply(query: str) -> str:  # all it knows is the prompt: the first useful command it has not given yet
        given = [line[2:] for line in query.splitlines() if line.startswith("> ")]
        useful = ("take apple", "go to countertop", "open microwave", "move apple 1 to microwave", "go to microwave")
        possible = query.rpartition("Possible commands: ")[2].splitlines()[0].split("; ")
        return "Action: " + next(c for verb in useful for c in possible if c.startswith(verb) and c not in given)

    pool = Pool({"m": Member("m", "x", 1.0, 1.0)}, {"m": Scripted(reply)})
    result = asyncio.run(play(AlfWorld(game()), [ReActExecutor(pool, "m")], lambda view: 0, "s"))
    assert result.won and len(result.steps) == 5
    assert result.cost == pytest.approx(5 * 15e-6) and pool.ledger.spent_usd == pytest.approx(result.cost)


def test_a_long_history_is_cut_from_the_front_and_said_so() -> None:
    session = Session(AlfWorld(game(), limit=40), "s")
    session.start()
    for place in ("fridge 1", "desk 1", "microwave 1"):
        session.take(f"go to {place}")
    pool = Pool({"m": Member("m", "x", 1.0, 1.0)}, {"m": Scripted()})
    query = ReActExecutor(pool, "m", history=2).query(session.view)
    assert "(1 earlier steps are left out)" in query and "> go to fridge 1" not in query and "> go to desk 1" in query


POSSIBLE = (
    "examine mug 2",
    "go to cabinet 1",
    "go to cabinet 11",
    "inventory",
    "look",
    "move mug 2 to cabinet 1",
    "use lamp 1",
)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("look", "look"),
        ("Action: look", "look"),
        ("Thought: I should go to cabinet 11 later.\nAction: go to cabinet 1", "go to cabinet 1"),
        ("Action: go to cabinet 1\nObservation: I arrive.\nAction: go to cabinet 11", "go to cabinet 1"),  # the first
        ("**Action:** `go to cabinet 1`.", "go to cabinet 1"),
        ("action : Go To The Cabinet 1!", "go to cabinet 1"),
        ("> go to cabinet 1", "go to cabinet 1"),
        ("I think:\n go to cabinet 11 \nbecause", "go to cabinet 11"),
        ("Action: put mug 2 in/on cabinet 1", "move mug 2 to cabinet 1"),
        ("Action: put the mug 2 in the cabinet 1", "move mug 2 to cabinet 1"),
        ("Action: turn on lamp 1", "use lamp 1"),
        ("Action: go to cabinett 1", "go to cabinet 1"),  # close, with the same numbers
        ("Action: go to cabinet 7", "go to cabinet 7"),  # other numbers are another command
        ("Action: sing", "sing"),
        ("", ""),
        ("Action:", ""),
        ("Action: " + "x" * 500, "x" * 200),
        ("Action: go to cabinet 1; look", "go to cabinet 1; look"),  # two commands are none
    ],
)
def test_reading_an_action(text: str, action: str) -> None:
    assert read_action(text, POSSIBLE) == action


def test_free_text_is_taken_as_it_stands() -> None:
    assert read_action("Thought: x\nAction: [ls(a=True)]", ()) == "[ls(a=True)]"
    assert read_action(" [pwd()] ", ()) == "[pwd()]"
