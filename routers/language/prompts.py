"""What the policy reads: the members with price and strength, the format of its turns, the question last.

Everything before the question is the same for all queries of a pool (and a price sensitivity), so the shared prefix
can be encoded once. Questions and descriptors are text of others: in the prompts of think/route agents they lose the
tags of the grammar, and whatever ``clean`` takes out (the policy's control tokens, which a chat template would read).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from routers.data.catalogue import Member, describe
from routers.data.table import ReplyTable
from routers.language.grammar import ROUTER_R1, Grammar, Marks, neutralise

Messages = list[dict[str, str]]
COST_WEIGHT = "cost_weight"
"""Column: the price sensitivity that a row's prompt states and its reward takes."""
Clean = Callable[[str], str]


def family_phrase(query: Mapping[str, Any]) -> str:
    """The reasoning of a turn to imitate: the family in words. Short, since every token of it is sampled in RL."""
    return str(query["family"]).replace("_", " ") or "question"


def price(member: Member) -> str:
    """What the short prompts show of a member's price: USD per million tokens, prompt/completion; "" without one."""
    return member.token_prices


def _named(member: Member) -> str:
    return f"{member.name} {price(member)}" if member.priced else member.name


def policy_prompt(
    query: str,
    members: Sequence[Member],
    grammar: Grammar | None = None,
    *,
    cost_weight: float | None = None,
    clean: Clean | None = None,
    show_members: bool = True,
) -> Messages:
    """One user message for ``apply_chat_template``: the prompt of a router, which names a member and is done.

    It is as short as it can be, since a small policy reads it thousands of times.

    Args:
        query: the question, put last and unchanged but for ``clean``.
        members: the pool in the order in which it is shown; prices are USD per million tokens, in/out.
        grammar: the tags of the action; ``None`` is the default grammar.
        cost_weight, clean: as in `think_route_prompt`.
        show_members: False: the question alone, and the price sensitivity, for a policy that has learned the pool and
            the format: with five members nine tokens in ten of a short question's prompt.

    Raises:
        ValueError: no member, or two of one name (a route action could not tell them apart); a cost weight outside
            [0, 1].
    """
    grammar = grammar or Grammar()
    _check(members)
    lines, query = _sensitivity(cost_weight), clean(query) if clean else query
    if show_members:
        pool = [f"{_named(m)}: {m.descriptor}" for m in members]
        lines = ["Who should answer?", *pool, *lines, f"Write {grammar.example()}"]
        query = f"Question: {query}"
    text = "\n".join([*lines, query])
    return [{"role": "user", "content": text}]


def think_route_prompt(
    question: str,
    members: Sequence[Member],
    grammar: Grammar = ROUTER_R1,
    *,
    cost_weight: float | None = None,
    clean: Clean | None = None,
) -> Messages:
    """One user message: the prompt of a think/route agent, after Router-R1 (prompt_pool.py), in our words.

    Unlike Router-R1's, its members come with price, latency and example scores (`routers.data.catalogue.describe`).

    Args:
        question: put last.
        members: the pool in the order in which it is shown.
        grammar: the tags.
        cost_weight: how much price matters, 0 to 1; None leaves the line out. Give the same number as the row's column
            ``cost_weight``, which the reward reads.
        clean: applied to the question and the descriptors.

    Raises:
        ValueError: see `policy_prompt`; and a cost weight outside [0, 1].
    """
    _check(members)

    def block(name: str, body: str = "...") -> str:
        return f"{grammar.open(name)} {body} {grammar.close(name)}"

    think = block(grammar.think)
    lines = [
        "Answer the question at the end.",
        f"Begin by reasoning inside {think}, and reason again whenever you have received new information.",
        f"If you lack knowledge, ask one of the language models listed below: write "
        f"{block(grammar.route, 'LLM-Name:Your-Query')}. Its reply comes back inside {block(grammar.information)}.",
        "Rules for asking:",
        "- LLM-Name is exactly one name of the list; Your-Query is a concrete question of your own. Never leave the "
        "placeholders in, and never copy a model's description.",
        f"- Say inside {think} what you are missing and why this model is the right one to ask.",
        "- The models differ in strengths, price and speed. Compare them, do not always take the same one; you may "
        "ask several times.",
        "- Write one action, then stop and wait for the reply.",
        "Models:",
        *(f"- {m.name}: {_safe(describe(m), grammar, clean)}" for m in members),
        *_sensitivity(cost_weight),
        f"When you know enough, give the answer alone, as short as possible, inside "
        f"{block(grammar.answer)}, for example {block(grammar.answer, 'Beijing')}.",
        f"Question: {_safe(question, grammar, clean)}",
    ]
    return [{"role": "user", "content": "\n".join(lines)}]


def short_think_route_prompt(
    question: str,
    members: Sequence[Member],
    grammar: Grammar = ROUTER_R1,
    *,
    cost_weight: float | None = None,
    clean: Clean | None = None,
) -> Messages:
    """The same for a policy of a million parameters: a line per member, the two actions by example, the question.

    Arguments and errors as in `think_route_prompt`.
    """
    _check(members)
    lines = [
        *(f"{_named(m)}: {_safe(m.descriptor, grammar, clean)}" for m in members),
        *_sensitivity(cost_weight),
        f"Write {grammar.open(grammar.think)}why{grammar.close(grammar.think)}"
        f"{grammar.open(grammar.route)}name:query{grammar.close(grammar.route)}"
        f" or {grammar.open(grammar.answer)}answer{grammar.close(grammar.answer)}",
        f"Question: {_safe(question, grammar, clean)}",
    ]
    return [{"role": "user", "content": "\n".join(lines)}]


def call_prompt(
    question: str,
    marks: Marks,
    *,
    short: bool = False,
    cost_weight: float | None = None,
    clean: Clean | None = None,
) -> Messages:
    """One user message: the prompt of an agent whose chat template tells it the members, as functions (`schemas`).

    Args:
        marks: of its text.
        short: one line of instructions, for a policy of a million parameters.
        question, cost_weight, clean: as in `think_route_prompt`.
    """
    lines = [
        "Answer the question at the end.",
        f"Reason inside <{marks.think}> ... </{marks.think}> first, and again whenever you have received a reply.",
        "If you lack knowledge, call a function: each asks another model, which reads your query and nothing else.",
        "Rules for calling:",
        "- The query is a concrete question of your own. Never copy a model's description.",
        "- The models differ in strengths, price and speed. Compare them, do not always take the same one; you may "
        "call several times.",
        "- Make one call, then stop and wait for the reply.",
        *_sensitivity(cost_weight),
        "When you know enough, write the answer alone instead of a call, as short as possible, for example: Beijing",
    ]
    if short:
        lines = [*_sensitivity(cost_weight), "Call a function, or write the answer"]
    return [{"role": "user", "content": "\n".join([*lines, f"Question: {_safe(question, marks, clean)}"])}]


def schemas(
    members: Mapping[str, Member],
    marks: Marks,
    *,
    short: bool = False,
    needs_query: bool = True,
    clean: Clean | None = None,
) -> list[dict[str, Any]]:
    """The members as functions, for ``apply_chat_template(tools=...)``.

    Args:
        members: by the name of their function.
        needs_query: False: a call without a query sends the question itself.
        marks, short, clean: as in `call_prompt`.

    Raises:
        ValueError: there is no member.
    """
    _check(list(members.values()))
    query = {"type": "string"} | ({} if short else {"description": "What to ask"})
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"] if needs_query else []}

    def told(member: Member) -> str:
        text = f"{price(member)} {member.descriptor}".strip() if short else describe(member)
        return _safe(text, marks, clean)

    return [
        {"type": "function", "function": {"name": name, "description": told(member), "parameters": parameters}}
        for name, member in members.items()
    ]


def weighed(row: Mapping[str, Any], weights: Sequence[float], weight: float | None = None) -> dict[str, Any]:
    """A row with its price sensitivity, where prompts state one: `weight`, or drawn of `weights` by the query's id."""
    if not weights:
        return dict(row)
    return {**row, COST_WEIGHT: drawn_cost_weight(row["query_id"], weights) if weight is None else weight}


def drawn_cost_weight(query_id: str, weights: Sequence[float]) -> float:
    """The price sensitivity of a training row: one of ``weights``, evenly, by the hash of its id.

    The same on every machine and in every epoch, so a group's completions share it.

    Raises:
        ValueError: there are no weights.
    """
    if not weights:
        raise ValueError("give at least one cost weight to draw from")
    digest = hashlib.sha256(f"cost_weight:{query_id}".encode()).digest()
    return weights[int.from_bytes(digest[:8], "big") % len(weights)]


def stated_cost_weight(weights: Sequence[float], asked: float | None) -> float | None:
    """The price sensitivity that a prompt states, of a policy trained with ``weights``: the one asked for, else the
    first. None: its prompts state none.

    Raises:
        ValueError: the policy was trained with none, or with none as low or as high.
    """
    if asked is None:
        return weights[0] if weights else None
    if not weights or not min(weights) <= asked <= max(weights):
        known = ", ".join(map(str, weights)) or "none (cost_weights: in a recipe trains several)"
        raise ValueError(f"cost_weight is {asked!r}; the policy was trained with: {known}")
    return asked


def measured(members: Sequence[Member], table: ReplyTable) -> list[Member]:
    """The members with ``latency`` (mean seconds) and ``examples`` (mean score per family) of the table's train split.

    What the catalogue states already stays; a member that the table does not hold stays as it is.
    """
    queries, correct, seconds = table.queries("train"), table.correct_matrix("train"), table.matrix("seconds", "train")
    rows: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        rows.setdefault(query["family"] or "all", []).append(i)
    found = []
    for member in members:
        if member.name in table.members and queries:
            column = table.members.index(member.name)
            scores = correct[:, column]
            member = replace(
                member,
                latency=float(seconds[:, column].mean()) if member.latency is None else member.latency,
                examples=member.examples or {family: float(scores[i].mean()) for family, i in rows.items()},
            )
        found.append(member)
    return found


def _sensitivity(cost_weight: float | None) -> list[str]:
    """The line by which one policy serves many trade-offs: the reward's weight, in words and as a number."""
    if cost_weight is None:
        return []
    if not 0 <= cost_weight <= 1:
        raise ValueError(f"cost_weight is {cost_weight!r}; it must lie in [0, 1]")
    return [f"Price sensitivity: {cost_weight:.2f} (0: only a right answer counts, 1: price counts as much)"]


def _safe(text: str, marks: Marks, clean: Clean | None) -> str:
    return neutralise(clean(text) if clean else text, marks)


def _check(members: Sequence[Member]) -> None:
    names = [member.name for member in members]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a prompt needs at least one member and every name once; got {names}")
