"""What a policy's turn leads to on recorded replies."""

import random

import pytest

from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.language.grammar import Grammar
from routers.tasks.query_routing.world import RecordedWorld

CATALOGUE = {"chat": Member("chat", "facts", 1.0, 2.0), "calculator": Member("calculator", "sums", 10.0, 20.0)}
# (query, member, reply, prompt tokens, completion tokens, correct)
REPLIES = [
    ("sum", "chat", "5", 10, 5, 0.0),
    ("sum", "calculator", "4", 30, 2, 1.0),
    ("fact", "chat", "Lima", 10, 5, 1.0),
    ("fact", "calculator", "<route>chat</route>", 30, 2, 0.5),
]


def table() -> ReplyTable:
    names = ("query_id", "member", "reply", "prompt_tokens", "completion_tokens", "correct")
    rows = [dict(zip(names, row, strict=True)) | {"query": f"the {row[0]}?", "split": "train"} for row in REPLIES]
    return ReplyTable(rows, CATALOGUE)


def route(member: str) -> str:
    return f"<think>x</think><route>{member}</route>"


def test_columns_by_hand() -> None:
    rows = [{"query_id": "sum"}, {"query_id": "sum"}, {"query_id": "fact"}, {"query_id": "fact"}, {"query_id": "fact"}]
    texts = [route("calculator"), route("chat"), route("chat"), route("calculator"), route("oracle")]
    columns = RecordedWorld(table())(rows, texts)
    assert columns == {
        "route": ["calculator", "chat", "chat", "calculator", None],
        # (30*10 + 2*20)/1e6 and (10*1 + 5*2)/1e6 USD; asking nobody costs nothing.
        "cost": pytest.approx([340e-6, 20e-6, 20e-6, 340e-6, 0.0]),
        "correct": [1.0, 0.0, 1.0, 0.5, 0.0],
        "reply": ["4", "5", "Lima", "<route>chat</route>", ""],
        "feedback": [
            "",
            "The route to chat gave a wrong answer.",
            "",
            "The route to calculator gave an only partly right answer.",
            columns["format_error"][4],
        ],
        "format_error": ["", "", "", "", columns["format_error"][4]],
    }
    assert "'oracle', which is not one member. The members are: chat, calculator." in columns["format_error"][4]


def test_feedback_never_tells_the_reply() -> None:
    columns = RecordedWorld(table())([{"query_id": "sum"}, {"query_id": "fact"}], [route("chat"), route("calculator")])
    assert all(reply not in text for reply, text in zip(columns["reply"], columns["feedback"], strict=True))


def test_outcomes_depend_on_nothing_but_row_and_text() -> None:
    pool, rng = RecordedWorld(table()), random.Random(0)
    names = ["chat", "calculator", "nobody", ""]
    batch = [({"query_id": rng.choice(["sum", "fact"])}, route(rng.choice(names))) for _ in range(50)]
    together = pool(*zip(*batch, strict=True))
    for i in rng.sample(range(50), 50):
        alone = pool([batch[i][0]], [batch[i][1]])
        assert {name: values[i] for name, values in together.items()} == {n: v[0] for n, v in alone.items()}


def test_the_grammar_is_the_pools() -> None:
    pool = RecordedWorld(table(), Grammar(route="search"))
    texts = ["<think>x</think><search>chat</search>", route("chat")]
    assert pool([{"query_id": "fact"}] * 2, texts)["route"] == ["chat", None]


@pytest.mark.parametrize("text", [route("chat"), "no action"])
def test_an_unknown_query_is_named(text: str) -> None:
    with pytest.raises(KeyError, match="'elsewhere'"):
        RecordedWorld(table())([{"query_id": "elsewhere"}], [text])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 rows but 2 completions"):
        RecordedWorld(table())([{"query_id": "sum"}], ["a", "b"])
