"""The action grammar: the one place that decides what a policy's text does.

A turn of the policy is one think block followed by one action; nothing else counts. The grammar is strict on purpose:
whatever it accepts is rewarded, so a second action, an action inside the reasoning or a name that merely contains a
member's name must all be invalid. Tags are plain ASCII and matched exactly; look-alikes are ordinary text.
Only text that the policy sampled may be given to the parsers: replies of pool members never are.

Two kinds of policy share it. A *router* (`parse`, `render`) writes one turn that names a member:
``<think>why</think><route>name</route>``. A *think/route agent* (`parse_turn`, `render_route`, `render_answer`) writes
turns until it answers: ``<think>why</think><search>name:query</search>`` or ``<think>..</think><answer>..</answer>``.
The agent's default tags are those of Router-R1 (arXiv:2506.09033, data_process/prompt_pool.py). In place of tags an
agent may write function calls (`routers.language.calls`); `routers.language.actions` is the face of both.

Text of others that a policy is shown between its turns is made harmless and framed. Three layers keep it from acting.
The parsers read policy turns only; the rollout encodes an observation's body without control or added tokens
(`srpo.types.Observation`); and here, tags of the grammar that a text spells out lose their angle brackets, so that
neither a policy nor a later reader of the transcript takes them for ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, Protocol

from srpo.types import Observation

_TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
REASONING = "\n\nIts reasoning, to the end: "
"""Stands between a member's answer and the end of what it thought before."""
_LONGEST_TAIL = 64  # characters between a tag's name and its ">", such as attributes
_IGNORED = ("Cf", "Mn", "Me", "Cc")  # zero-width and other format characters, combining marks, controls
_SHOWABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,/-]{0,39}")


@dataclass(frozen=True)
class Action:
    """What one turn does.

    ``member`` names whom a route asks, ``query`` what (`parse_turn` only), ``answer`` is the text of an answer;
    ``error`` says in words why a turn is "invalid". ``final``: the episode ends with this turn.
    """

    kind: Literal["route", "answer", "invalid"]
    member: str | None
    think: str
    error: str = ""
    query: str = ""
    answer: str | None = None
    final: bool = False


class Marks(Protocol):
    """What text of others must not spell, and where reasoning stands."""

    @property
    def think(self) -> str: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def tags(self) -> re.Pattern[str]:
        """Any opening or closing tag of these names."""


@dataclass(frozen=True)
class Grammar:
    """Names of the tags; ``information`` frames what the world says. Router-R1 spells the route action "search".

    Raises:
        ValueError: a name is not an ASCII word, or two are equal.
    """

    think: str = "think"
    route: str = "route"
    answer: str = "answer"
    information: str = "information"

    def __post_init__(self) -> None:
        names = self.names
        for name in names:
            if not isinstance(name, str) or not _TAG_NAME.fullmatch(name):
                raise ValueError(f"tag name {name!r} is not an ASCII word such as 'route'")
        if len(set(names)) != len(names):
            raise ValueError(f"the tag names {names} are not all different")

    @property
    def names(self) -> list[str]:
        return [getattr(self, field.name) for field in fields(self)]

    def open(self, name: str) -> str:
        return f"<{name}>"

    def close(self, name: str) -> str:
        return f"</{name}>"

    @cached_property
    def tags(self) -> re.Pattern[str]:
        """Any opening or closing tag of this grammar. One alternation without repeats: linear on any text."""
        return re.compile(f"</?(?:{'|'.join(map(re.escape, self.names))})>")

    @property
    def stops(self) -> tuple[str, str]:
        """Where a turn of a think/route agent ends: the stop strings of its generator."""
        return self.close(self.route), self.close(self.answer)

    def example(self, member: str = "name") -> str:
        """One valid turn of a router, for prompts: ``<think>why</think><route>name</route>``."""
        return render("why", member, self)


DEFAULT = Grammar()
ROUTER_R1 = Grammar(route="search")
"""The tags of Router-R1's prompts and checkpoints."""


def parse(text: str, members: Collection[str], grammar: Grammar | None = None) -> Action:
    """Read a router's turn: a think block with some text, then a route action that names exactly one member.

    White space around the blocks, the reasoning and the name is ignored. Names match exactly, case included.

    Args:
        text: what the policy sampled, special tokens removed.
        members: names that may be routed to.
        grammar: the tags; ``None`` is the default grammar.

    Returns:
        ``kind="route"``, or ``kind="invalid"`` with the first thing that is wrong. ``error`` never repeats more of the
        text than a short plain word, because it is shown to a model again as feedback.
    """
    grammar = grammar or Grammar()
    think, error, rest = think_block(text, grammar, required=True)
    if error:
        return Action("invalid", None, think, error)
    _, body, error = _action_block(rest, (grammar.route,), grammar)
    error = error or _member_error(body, members)
    return Action("invalid", None, think, error) if error else Action("route", body, think)


def parse_turn(
    text: str,
    members: Collection[str],
    grammar: Grammar = ROUTER_R1,
    *,
    needs_think: bool = True,
    forward_empty: bool = False,
) -> Action:
    """Read one turn of a think/route agent: a think block, then one route action or one answer, then nothing.

    A route is ``name:query``; the query is everything after the first colon, further colons and line breaks included.
    A turn that closes an answer tag anywhere is ``final``, valid or not: whoever writes two answers, or an answer and
    a route, gets no second try.

    Args:
        text: what the policy sampled in this turn, special tokens removed.
        members: names that may be routed to, without colons.
        grammar: the tags.
        needs_think: the turn must begin with a think block; else the block may be left out. Never empty if there.
        forward_empty: a route without a query (``name`` or ``name:``) is valid; its ``query`` is "". Router-R1 refuses
            that.

    Returns:
        ``kind`` "route" or "answer", or "invalid" with the first thing that is wrong (see `parse`).
    """
    final = grammar.close(grammar.answer) in text

    def invalid(error: str) -> Action:
        return Action("invalid", None, think, error, final=final)

    think, error, rest = think_block(text, grammar, needs_think)
    if error:
        return invalid(error)
    kind, body, error = _action_block(rest, (grammar.route, grammar.answer), grammar)
    if error:
        return invalid(error)
    if kind == grammar.answer:
        return Action("answer", None, think, answer=body, final=True) if body else invalid("The answer was empty.")
    name, colon, query = (part.strip() for part in body.partition(":"))
    error = _member_error(name, members)
    if not (error or query or forward_empty):
        example = f"{grammar.open(grammar.route)} name:query {grammar.close(grammar.route)}"
        what = "the query after the colon was empty" if colon else "there was no colon between name and query"
        error = f"In the route action {what}; write {example}."
    return invalid(error) if error else Action("route", name, think, query=query)


def render(think: str, member: str, grammar: Grammar | None = None) -> str:
    """The turn that ``parse`` reads back as ``Action("route", member, think)``.

    Raises:
        ValueError: no text could be read back so: an empty or padded part, or a part that holds a tag.
    """
    grammar = grammar or Grammar()
    return _block("reasoning", think, grammar.think, grammar) + _block("member name", member, grammar.route, grammar)


def render_route(think: str, member: str, query: str, grammar: Grammar = ROUTER_R1) -> str:
    """The turn that ``parse_turn`` reads back as this route. Without ``think``, or without ``query``, it has none.

    Raises:
        ValueError: as ``render``; and a member name with a colon.
    """
    if ":" in member:
        raise ValueError(f"the member name {member[:80]!r} holds a colon; the first colon ends the name")
    if query != query.strip() or not member.strip():
        raise ValueError(f"the member name {member[:80]!r} is empty, or the query is padded with spaces")
    reasoning = _block("reasoning", think, grammar.think, grammar) if think else ""
    return reasoning + _block("route", f"{member}:{query}", grammar.route, grammar)


def render_answer(think: str, answer: str, grammar: Grammar = ROUTER_R1) -> str:
    """The turn that ``parse_turn`` reads back as this answer. Without ``think`` it has no think block.

    Raises:
        ValueError: as ``render``.
    """
    reasoning = _block("reasoning", think, grammar.think, grammar) if think else ""
    return reasoning + _block("answer", answer, grammar.answer, grammar)


def name_error(name: str) -> str:
    """Why ``name`` cannot be a member that policies route to; "" when it can.

    A name is copied by the policy letter by letter and shown in prompts and error messages, so it is plain: ASCII
    letters and digits, spaces and ``_ . , / -``, at most 40 characters.
    """
    if _SHOWABLE.fullmatch(name) and name == name.strip():
        return ""
    return f"member name {name[:60]!r} must be 1 to 40 ASCII letters, digits, spaces or any of '_.,/-'"


def _block(what: str, body: str, tag: str, grammar: Grammar) -> str:
    if not body or body != body.strip() or grammar.tags.search(body):
        raise ValueError(f"the {what} {body[:80]!r} is empty, padded with spaces or holds a tag of the grammar")
    return f"{grammar.open(tag)}{body}{grammar.close(tag)}"


def shown_name(name: str) -> str:
    """A name that a policy wrote, for an error: quoted, or "something" where it is no short plain word."""
    return repr(name) if _SHOWABLE.fullmatch(name) else "something"


def think_block(text: str, marks: Marks, required: bool) -> tuple[str, str, str]:
    """(reasoning, error, what follows the block)."""
    opening, closing = f"<{marks.think}>", f"</{marks.think}>"
    text = text.strip()
    if not text:
        return "", "The text was empty.", ""
    if not text.startswith(opening):
        return "", f"The text did not start with {opening}." if required else "", text
    body = text[len(opening) :]
    tag = marks.tags.search(body)
    if tag is None:
        return "", f"The think block was not closed with {closing}.", ""
    if tag.group() != closing:
        return "", f"There was {tag.group()} inside the think block.", ""
    think = body[: tag.start()].strip()
    return think, "" if think else "The think block was empty.", body[tag.end() :].strip()


def _action_block(rest: str, names: Sequence[str], grammar: Grammar) -> tuple[str, str, str]:
    """(tag name, stripped body, error) of the text after the think block: one block of ``names`` and nothing else."""
    openings = [grammar.open(name) for name in names]
    wanted = " or ".join(openings)
    if not rest:
        return "", "", f"There was no {wanted} action after the think block."
    tag = grammar.tags.match(rest)
    if tag is None:
        return "", "", f"After the think block came text that is not a {wanted} action."
    if tag.group() not in openings:
        return "", "", f"After the think block came {tag.group()} where {wanted} was expected."
    name = names[openings.index(tag.group())]
    what, closing = "answer" if name == grammar.answer else "route action", grammar.close(name)
    body = rest[tag.end() :]
    tag = grammar.tags.search(body)
    if tag is None:
        return "", "", f"The {what} was not closed with {closing}."
    if tag.group() != closing:
        return "", "", f"There was {tag.group()} inside the {what}."
    if body[tag.end() :].strip():
        return "", "", f"There was more text after {closing}; exactly one action is allowed."
    return name, body[: tag.start()].strip(), ""


def _member_error(name: str, members: Collection[str]) -> str:
    """Why ``name`` is no member, in words; "" when it is one."""
    if name in members:
        return ""
    known = ", ".join(members)
    if not name:
        return f"The route action named no member. The members are: {known}."
    return f"The route action named {shown_name(name)}, which is not one member. The members are: {known}."


def neutralise(text: str, marks: Marks) -> str:
    """``text`` with every tag of these names in round brackets: ``</answer>`` becomes ``(/answer)``. Linear time.

    Also taken for tags: other case, white space or attributes inside, no closing bracket (a tag may be cut off at the
    end), full-width and other compatibility forms, and zero-width or combining characters in between.
    """
    plain, origin = _plain(text)
    names = "|".join(map(re.escape, marks.names))
    blanks = r"\s{0,8}"  # every repeat is bounded: linear on any text
    tag = re.compile(
        rf"<{blanks}(?:/{blanks})?(?:{names})(?![a-z0-9_-])(?:[^<>]{{0,{_LONGEST_TAIL}}}>)?", re.IGNORECASE
    )
    out = list(text)
    for match in tag.finditer(plain):
        out[origin[match.start()]] = "("
        if match.group().endswith(">"):
            out[origin[match.end() - 1]] = ")"
    return "".join(out)


def framed(text: str, marks: Marks, before: str, after: str, reasoning: str = "") -> Observation:
    """Text of others between a frame of ours, which is closed after the rollout has cut the text to size.

    ``reasoning`` is what a member thought aloud: its end is shown behind the answer, where there is room for it.
    """
    return Observation(
        body=neutralise(text, marks).strip(),
        before=before,
        after=after,
        aside=neutralise(reasoning, marks).strip(),
        between=REASONING if reasoning else "",
    )


def reply_observation(text: str, grammar: Grammar, reasoning: str = "") -> Observation:
    """A member's reply in the information frame of Router-R1."""
    opening, closing = grammar.open(grammar.information), grammar.close(grammar.information)
    return framed(text, grammar, f"\n\n{opening}", f"{closing}\n\n", reasoning)


def _plain(text: str) -> tuple[str, list[int] | range]:
    """``text`` as a look-alike hunter reads it, and for each of its characters the index in ``text``."""
    if text.isascii() and text.isprintable():
        return text, range(len(text))
    plain: list[str] = []
    origin: list[int] = []
    for i, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character):
            if part in "\t\n\r" or unicodedata.category(part) not in _IGNORED:
                plain.append(part)
                origin.append(i)
    return "".join(plain), origin
