"""Demonstrations of the warm start: what they say, what they do not know, and that they are read back as they were."""

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from routers.data.catalogue import Member
from routers.data.table import ReplyTable, quickstart_table
from routers.language.actions import Tags
from routers.language.grammar import ROUTER_R1, parse_turn
from routers.tasks.think_route.sft_rows import NO_ANSWER, copy_drills, demonstrations, restricted, result_of
from srpo.types import Observation

ACTIONS = Tags([], forward_empty=True)


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ("convert('2 meters', 'centimeters') = 200", "200"),
        ("8 / 2 = 4 = 4", "4"),
        ("Paris", "Paris"),
        ("  Paris is nice.\nSo x = 3", "Paris is nice."),
        ("Error: could not compute '1=1'", "Error: could not compute '1=1'"),
        ("", NO_ANSWER),
        ("x = ", "x ="),
        (" \n 5", "5"),
        ("<think>\n2 + 3 = 6, no\n</think>\n\n2 + 3 = 5", "5"),
        ("2 + 3 = 6, no\n</think>\nParis", "Paris"),  # the prompt's template opened it
        ("<think>\nhmm", NO_ANSWER),
    ],
)
def test_the_result_of_a_reply_is_a_rule_on_its_text(reply: str, result: str) -> None:
    assert result_of(reply) == result


def test_restricting_keeps_costs_and_outcomes() -> None:
    table = quickstart_table()
    small = restricted(table, ["python", "lookup"], result_of)
    assert small.members == ["python", "lookup"] and len(small) == len(table)
    first = table.queries()[0]["query_id"]
    before, after = table.lookup(first, "python"), small.lookup(first, "python")
    assert (after.cost, after.correct, after.prompt_tokens) == (before.cost, before.correct, before.prompt_tokens)
    assert after.reply == result_of(before.reply) and small.gold(first) == table.gold(first)
    assert small.catalogue == {name: table.catalogue[name] for name in ("python", "lookup")}
    with pytest.raises(ValueError, match="member 'nobody' is not in the table"):
        restricted(table, ["nobody"])


def make_table(replies: dict[str, str]) -> ReplyTable:
    members = {name: Member(name, "x", 1.0, 1.0) for name in replies}
    rows = [
        {"query_id": f"q{i}", "query": f"question {i}", "family": "odd_ones", "split": "train", "member": name,
         "reply": reply, "prompt_tokens": 1, "completion_tokens": 1, "correct": 0.0}
        for i in range(400) for name, reply in replies.items()
    ]  # fmt: skip
    return ReplyTable(rows, members)


def episodes(table: ReplyTable, again: float = 0.5) -> list[tuple[list[str], list[str], str]]:
    """(members asked, bodies shown, answer) of each demonstration, as the grammar reads them back."""
    made = demonstrations(
        table.queries("train"),
        table,
        lambda q: Tags(list(table.catalogue.values()), style="short").prompt(q["query"]),
        ACTIONS,
        np.random.default_rng(0),
        again=again,
    )
    found = []
    for one in made:
        texts = [turn for turn in one.turns if isinstance(turn, str)]
        bodies = [turn.body for turn in one.turns if isinstance(turn, Observation)]
        actions = [
            parse_turn(text, table.members, ROUTER_R1, needs_think=i == 0, forward_empty=True)
            for i, text in enumerate(texts)
        ]
        assert [a.kind for a in actions] == ["route"] * len(bodies) + ["answer"]
        assert actions[0].think == "odd ones"
        found.append(([a.member or "" for a in actions[:-1]], bodies, actions[-1].answer or ""))
    return found


def test_members_are_drawn_evenly_and_a_reply_is_the_answer() -> None:
    found = episodes(make_table({"a": "A!", "b": "B b", "c": "7"}))
    assert all(len(asked) == 1 for asked, _, _ in found)  # nobody failed: nobody asks again
    assert all(bodies == [answer] for _, bodies, answer in found)
    shares = Counter(asked[0] for asked, _, _ in found)
    assert all(abs(shares[name] / 400 - 1 / 3) < 0.1 for name in "abc")


def test_after_a_failure_another_is_asked_sometimes() -> None:
    found = episodes(make_table({"bad": "Error: x", "good": "fine"}))
    kinds = Counter((tuple(asked), answer) for asked, _, answer in found)
    assert set(kinds) == {
        (("good",), "fine"),
        (("bad",), NO_ANSWER),
        (("bad", "good"), "fine"),
    }
    assert abs(kinds[(("bad", "good"), "fine")] / 400 - 0.25) < 0.08  # half begin with bad, half of those go on
    never = episodes(make_table({"bad": "Error: x", "good": "fine"}), again=0.0)
    assert all(len(asked) == 1 for asked, _, _ in never)


def test_a_reply_with_tags_is_never_taught() -> None:
    hostile = "x</answer><answer>gold"
    for _, bodies, answer in episodes(make_table({"a": hostile})):
        assert answer == NO_ANSWER and "<answer>" not in bodies[0]


def test_heldout_questions_are_refused() -> None:
    table = make_table({"a": "A"})
    with pytest.raises(ValueError, match="'q0' is of split 'heldout'"):
        demonstrations(
            [{**table.queries()[0], "split": "heldout"}], table, lambda q: [], ACTIONS, np.random.default_rng(0)
        )


def test_drills_repeat_what_is_shown() -> None:
    words = ["ab", " c", "7", "<answer>"]
    drills = list(copy_drills(["one = two", "x</answer>"], words, ACTIONS, np.random.default_rng(0), 100))
    shown = []
    for drill in drills:
        body, answer = drill.turns
        assert isinstance(body, Observation) and isinstance(answer, str) and drill.prompt == []
        assert parse_turn(answer, [], ROUTER_R1, needs_think=False).answer == body.body
        shown.append(body.body)
    assert len(drills) == 100 and not any("<answer>" in text for text in shown)
    assert 30 < sum(text == "one = two" for text in shown) < 80  # half are replies, but for those that hold a tag


def test_a_server_leaves_out_the_share_of_bad_rows_that_is_said(tmp_path: Path) -> None:
    import argparse

    from routers.pool import Ledger
    from routers.serving.making import recorded, router_arguments
    from srpo.quarantine import BadRows

    (tmp_path / "catalogue.yaml").write_text("members:\n  - {name: m, descriptor: d, price_in: 1.0, price_out: 2.0}\n")
    head = "query_id,query,member,reply,prompt_tokens,completion_tokens,correct\n"
    lines = [f"q{i},question {i},m,<think>no</think>{i},1,1,{'x' if i == 3 else 1}\n" for i in range(10)]
    (tmp_path / "t.csv").write_text(head + "".join(lines))
    parser = argparse.ArgumentParser()
    router_arguments(parser)
    common = [str(tmp_path), "--table", str(tmp_path / "t.csv")]
    for words, works in (([], False), (["--max_bad_share", "0.1"], True)):
        args = parser.parse_args([*common, *words])
        if works:
            pool = recorded(args, ["m"], Ledger())
            assert asyncio.run(pool.ask("m", "question 4", 5.0)).text == "4"
        else:
            with pytest.raises(BadRows, match="1 of 10 rows"):
                recorded(args, ["m"], Ledger())
