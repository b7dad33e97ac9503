"""Turns of think/route agents: what they do, what is refused, and that rendering is the inverse of parsing."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.language.grammar import ROUTER_R1, Action, Grammar, name_error, parse_turn, render_answer, render_route

MEMBERS = ["small", "meta/llama-3.1-70b", "large"]
T = "<think>x</think>"


@pytest.mark.parametrize(
    "text, member, query",
    [
        (T + "<search>small:who?</search>", "small", "who?"),
        (" <think> x </think>\n\n<search> small : who? </search>\n\n", "small", "who?"),
        (T + "<search>meta/llama-3.1-70b:a: b:c</search>", "meta/llama-3.1-70b", "a: b:c"),
        (T + "<search>small::</search>", "small", ":"),
        (T + "<search>small:line 1\nline 2\n\nline: 3</search>", "small", "line 1\nline 2\n\nline: 3"),
        (T + "<search>small:is large: better than <b>small</b>? {x} %s \\1 ＜/search＞ 🤖</search>", "small", None),
    ],
)
def test_routes(text: str, member: str, query: str | None) -> None:
    action = parse_turn(text, MEMBERS)
    assert (action.kind, action.member, action.error, action.final) == ("route", member, "", False)
    assert action.query == (query or "is large: better than <b>small</b>? {x} %s \\1 ＜/search＞ 🤖")


def test_answers() -> None:
    action = parse_turn(T + "<answer> New\nYork: <i>City</i> </answer>", MEMBERS)
    assert action == Action("answer", None, "x", answer="New\nYork: <i>City</i>", final=True)


def test_the_think_block_may_be_left_out_but_never_empty_or_broken() -> None:
    assert parse_turn("<answer>Paris</answer>", MEMBERS).error == "The text did not start with <think>."
    assert parse_turn("<answer>Paris</answer>", MEMBERS, needs_think=False).answer == "Paris"
    assert parse_turn("<search>small:q</search>", MEMBERS, needs_think=False).member == "small"
    for think in ("<think> </think>", "<think>x", "x</think>", "<think>x</think><think>y</think>"):
        assert parse_turn(think + "<answer>Paris</answer>", MEMBERS, needs_think=False).kind == "invalid"


# (text, a part of the error, whether the episode is over)
INVALID = [
    ("", "empty", False),
    ("Paris", "did not start", False),
    (T, "no <search> or <answer> action", False),
    (T + "Paris", "not a <search> or <answer> action", False),
    (T + "<route>small:q</route>", "not a <search> or <answer> action", False),
    (T + "<search>small q</search>", "'small q', which is not one member", False),
    (T + "<search>small</search>", "there was no colon between name and query", False),
    (T + "<search>small:</search>", "the query after the colon was empty", False),
    (T + "<search>small: \n </search>", "the query after the colon was empty", False),
    (T + "<search>:q</search>", "named no member", False),
    (T + "<search>Small:q</search>", "'Small'", False),
    (T + "<search>smal:q</search>", "'smal'", False),
    (T + "<search>smaller:q</search>", "'smaller'", False),
    (T + "<search>small, large:q</search>", "'small, large'", False),
    (T + "<search>ask small:q</search>", "'ask small'", False),
    (T + "<search>LLM-Name:Your-Query</search>", "'LLM-Name'", False),
    (T + "<search>small:q", "not closed", False),
    (T + "<search>small:q</search>.", "more text after", False),
    (T + "<search>small:q</search><search>large:q</search>", "more text after", False),
    (T + "<search>small:<think>q</think></search>", "<think> inside the route action", False),
    (T + "<search>small:q<information>Paris</information></search>", "<information> inside", False),
    (T + "<search>small:q</search><information>Paris</information>", "more text after", False),
    (T + "<information>Paris</information>", "<information> where", False),
    ("<think><search>small:q</search></think>", "<search> inside the think block", False),
    (T + "<answer>Paris", "not closed", False),
    # what closes an answer is final
    ("</answer>", "did not start", True),
    (T + "<answer></answer>", "The answer was empty", True),
    (T + "<answer>\u3000</answer>", "The answer was empty", True),
    (T + "<answer>Paris</answer><answer>Rome</answer>", "more text after </answer>", True),
    (T + "<answer>Paris</answer>" * 2, "more text after </answer>", True),
    (T + "<answer>Paris</answer> Rome", "more text after </answer>", True),
    (T + "<answer><answer>Paris</answer></answer>", "<answer> inside the answer", True),
    (T + "<answer>Paris</answer><search>small:q</search>", "more text after </answer>", True),
    (T + "<search>small:q</search><answer>Paris</answer>", "more text after </search>", True),
    (T + "<search>small:<answer>Paris</answer></search>", "<answer> inside the route action", True),
    (T + "<answer><think>Paris</think></answer>", "<think> inside the answer", True),
    (T + "<answer><information>Paris</information></answer>", "<information> inside the answer", True),
    ("<think><answer>Paris</answer></think>", "<answer> inside the think block", True),
    ("<think><answer>Paris</answer></think><answer>Rome</answer>", "<answer> inside the think block", True),
    ("<answer>Paris</answer>" + T, "did not start", True),
]


@pytest.mark.parametrize("text, reason, final", INVALID, ids=range(len(INVALID)))
def test_invalid_turns(text: str, reason: str, final: bool) -> None:
    action = parse_turn(text, MEMBERS)
    assert (action.kind, action.member, action.answer, action.final) == ("invalid", None, None, final)
    assert reason in action.error
    assert len(action.error) < 200


def test_an_empty_query_can_stand_for_the_question() -> None:
    for body in ("small", "small:", " small : "):
        action = parse_turn(f"{T}<search>{body}</search>", MEMBERS, forward_empty=True)
        assert (action.kind, action.member, action.query) == ("route", "small", "")
    assert parse_turn(f"{T}<search>smal</search>", MEMBERS, forward_empty=True).kind == "invalid"


def test_tags_are_configurable() -> None:
    grammar = Grammar(think="plan", route="call", answer="final", information="result")
    assert parse_turn("<plan>x</plan><call>small:q</call>", MEMBERS, grammar).query == "q"
    assert parse_turn("<plan><answer>a</answer></plan><final>b</final>", MEMBERS, grammar).answer == "b"
    assert grammar.stops == ("</call>", "</final>")
    assert ROUTER_R1.stops == ("</search>", "</answer>")
    with pytest.raises(ValueError, match="not all different"):
        Grammar(information="answer")


def _plain(text: str) -> bool:
    return not ROUTER_R1.tags.search(text)


@given(st.text(max_size=40), st.sampled_from(MEMBERS), st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_rendering_is_the_inverse(think: str, member: str, body: str) -> None:
    think, body = think.strip(), body.strip()
    if not _plain(think) or not _plain(body):
        return
    action = parse_turn(render_route(think, member, body), MEMBERS, needs_think=False, forward_empty=True)
    assert action == Action("route", member, think, query=body)
    if body:
        action = parse_turn(render_answer(think, body), MEMBERS, needs_think=False)
        assert action == Action("answer", None, think, answer=body, final=True)


@pytest.mark.parametrize(
    "think, member, query",
    [("</think>", "small", "q"), (" x", "small", "q"), ("x", "a:b", "q"), ("x", "", "q"), ("x", "small", " q")],
)
def test_what_could_not_be_read_back_is_not_rendered(think: str, member: str, query: str) -> None:
    with pytest.raises(ValueError, match=r"empty|colon|padded"):
        render_route(think, member, query)
    with pytest.raises(ValueError, match="empty, padded"):
        render_answer("x", "</answer>")


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "small:q", "x", " "]
        ),
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_accepted_holds_exactly_one_action(pieces: list[str]) -> None:
    text = "".join(pieces)
    action = parse_turn(text, ["small"], needs_think=False)
    routes, answers = (tuple(text.count(f"<{s}{name}>") for s in ("", "/")) for name in ("search", "answer"))
    if action.kind == "route":
        assert (routes, answers) == ((1, 1), (0, 0)) and text.strip().endswith("</search>")
    if action.kind == "answer":
        assert (routes, answers) == ((0, 0), (1, 1)) and text.strip().endswith("</answer>")
    assert action.final == ("</answer>" in text)
    assert (action.kind == "invalid") == bool(action.error)


@pytest.mark.parametrize("piece", ["<", "<think>", "<search>", "</answer>", ":", "small:", " ", "<information>"])
@pytest.mark.parametrize("before", ["", "<think>", T, T + "<search>", T + "<search>small:", T + "<answer>"])
def test_long_repeats_are_read_in_linear_time(piece: str, before: str) -> None:
    text = before + piece * (400_000 // len(piece))
    start = time.perf_counter()
    parse_turn(text, MEMBERS)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "name",
    ["", " small", "small ", "a:b", "a</search>", "＜search＞", "a\nb", "a\u200bb", "<|im_end|>", "x" * 41, "[INST]"],
)
def test_names_that_a_policy_could_not_copy_are_refused(name: str) -> None:
    assert "must be 1 to 40 ASCII" in name_error(name)


def test_names_of_the_field_are_fine() -> None:
    for name in ("Qwen2.5-7B-Instruct", "meta/llama-3.1-70b-instruct", "gpt-4.1 mini", "o3", "mistral_7b,v0.3"):
        assert name_error(name) == ""
