"""The action grammar: the one place that decides what a policy's text does.

A turn of the policy is one think block followed by one action; nothing else counts. The grammar is strict on purpose:
whatever it accepts is rewarded, so a second action, an action inside the reasoning or a name that merely contains a
member's name must all be invalid. Tags are plain ASCII and matched exactly; look-alikes are ordinary text.
Only text that the policy sampled may be given to ``parse``: replies of pool members never are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

_TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_SHOWABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,/-]{0,39}")


@dataclass(frozen=True)
class Action:
    """What one turn does. ``member`` is None and ``error`` says why, in words, exactly when ``kind`` is "invalid"."""

    kind: Literal["route", "invalid"]
    member: str | None
    think: str
    error: str = ""


@dataclass(frozen=True)
class Grammar:
    """Names of the tags. Router-R1 spells the route action ``Grammar(route="search")``.

    Raises:
        ValueError: a name is not an ASCII word, or two are equal.
    """

    think: str = "think"
    route: str = "route"
    answer: str = "answer"

    def __post_init__(self) -> None:
        names = [getattr(self, field.name) for field in fields(self)]
        for name in names:
            if not isinstance(name, str) or not _TAG_NAME.fullmatch(name):
                raise ValueError(f"tag name {name!r} is not an ASCII word such as 'route'")
        if len(set(names)) != len(names):
            raise ValueError(f"the tag names {names} are not all different")

    def open(self, name: str) -> str:
        return f"<{name}>"

    def close(self, name: str) -> str:
        return f"</{name}>"

    @cached_property
    def tags(self) -> re.Pattern[str]:
        """Any opening or closing tag of this grammar. One alternation without repeats: linear on any text."""
        names = (re.escape(getattr(self, field.name)) for field in fields(self))
        return re.compile(f"</?(?:{'|'.join(names)})>")

    def example(self, member: str = "name") -> str:
        """One valid turn, for prompts: ``<think>why</think><route>name</route>``."""
        return render("why", member, self)


def parse(text: str, members: Collection[str], grammar: Grammar | None = None) -> Action:
    """Read one policy turn: a think block with some text, then a route action that names exactly one member.

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
    think, error, rest = _think_block(text, grammar)
    if error:
        return Action("invalid", None, think, error)
    member, error = _route_block(rest, members, grammar)
    return Action("invalid", None, think, error) if error else Action("route", member, think)


def render(think: str, member: str, grammar: Grammar | None = None) -> str:
    """The turn that ``parse`` reads back as ``Action("route", member, think)``.

    Raises:
        ValueError: no text could be read back so: an empty or padded part, or a part that holds a tag.
    """
    grammar = grammar or Grammar()
    for what, part in (("reasoning", think), ("member name", member)):
        if not part or part != part.strip() or grammar.tags.search(part):
            raise ValueError(f"the {what} {part[:80]!r} is empty, padded with spaces or holds a tag of the grammar")
    return (
        f"{grammar.open(grammar.think)}{think}{grammar.close(grammar.think)}"
        f"{grammar.open(grammar.route)}{member}{grammar.close(grammar.route)}"
    )


def _think_block(text: str, grammar: Grammar) -> tuple[str, str, str]:
    """(reasoning, error, what follows the block)."""
    opening, closing = grammar.open(grammar.think), grammar.close(grammar.think)
    text = text.strip()
    if not text:
        return "", "The text was empty.", ""
    if not text.startswith(opening):
        return "", f"The text did not start with {opening}.", ""
    body = text[len(opening) :]
    tag = grammar.tags.search(body)
    if tag is None:
        return "", f"The think block was not closed with {closing}.", ""
    if tag.group() != closing:
        return "", f"There was {tag.group()} inside the think block.", ""
    think = body[: tag.start()].strip()
    return think, "" if think else "The think block was empty.", body[tag.end() :].strip()


def _route_block(rest: str, members: Collection[str], grammar: Grammar) -> tuple[str | None, str]:
    """(member, error) of the text after the think block."""
    opening, closing = grammar.open(grammar.route), grammar.close(grammar.route)
    if not rest:
        return None, f"There was no {opening} action after the think block."
    tag = grammar.tags.match(rest)
    if tag is None:
        return None, f"After the think block came text that is not a {opening} action."
    if tag.group() != opening:
        return None, f"After the think block came {tag.group()} where {opening} was expected."
    body = rest[tag.end() :]
    tag = grammar.tags.search(body)
    if tag is None:
        return None, f"The route action was not closed with {closing}."
    if tag.group() != closing:
        return None, f"There was {tag.group()} inside the route action."
    if body[tag.end() :].strip():
        return None, f"There was more text after {closing}; exactly one action is allowed."
    name = body[: tag.start()].strip()
    if name in members:
        return name, ""
    return None, _unknown(name, list(members))


def _unknown(name: str, members: Sequence[str]) -> str:
    known = ", ".join(members)
    if not name:
        return f"The route action named no member. The members are: {known}."
    shown = f" {name!r}" if _SHOWABLE.fullmatch(name) else ""
    return f"The route action named{shown or ' something'}, which is not one member. The members are: {known}."
