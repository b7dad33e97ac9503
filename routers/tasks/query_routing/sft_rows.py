"""Rows of the supervised warm start, made from training queries only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from routers.data.catalogue import Member
from routers.language.grammar import Grammar, parse, render
from routers.language.prompts import policy_prompt
from routers.tasks.query_routing.world import feedback_text

Messages = list[dict[str, str]]
Reprompt = Callable[[Messages, str | None, str | None], Messages]


def family_phrase(query: Mapping[str, Any]) -> str:
    """The reasoning of a warm-start turn: the family in words. Short, since every token of it is sampled in RL."""
    return str(query["family"]).replace("_", " ") or "question"


def warm_start_rows(
    queries: Sequence[Mapping[str, Any]],
    correct: np.ndarray,
    members: Sequence[Member],
    grammar: Grammar,
    rng: np.random.Generator,
    reprompt: Reprompt | None = None,
    reprompt_share: float = 0.25,
    think: Callable[[Mapping[str, Any]], str] = family_phrase,
) -> list[dict[str, Messages]]:
    """One turn per query, in the order of the queries, by a member drawn uniformly among those that are right on it.

    The draw is deliberately not the cheapest or the best: the start knows the format and roughly who can answer, and
    is left unsharp for reinforcement learning. A query that nobody gets right gives no row.

    Args:
        queries: ``query``, ``family`` (see ``think``) and ``split``; a held-out query is refused.
        correct: ``[len(queries), len(members)]``, 0 to 1; right means 1.
        members: the pool, in the order in which the prompt shows it.
        grammar: the tags of the action.
        rng: draws members and forms; the same generator state gives the same rows.
        reprompt: ``(prompt, demonstration, feedback) -> prompt`` in the self-teacher's words. A policy that starts
            from nothing must have seen that form, or its teacher cannot use it. ``None``: no such rows.
        reprompt_share: probability that a query is given in the reprompted form: half of these with a right
            turn as demonstration (the target is its member), half with feedback on a wrong one where there is one.
        think: the reasoning for a query.

    Raises:
        ValueError: shapes differ, a share outside [0, 1], or a query of the held-out split.
    """
    if correct.shape != (len(queries), len(members)):
        raise ValueError(f"correct has shape {correct.shape}, not (queries, members) {(len(queries), len(members))}")
    if not 0 <= reprompt_share <= 1:
        raise ValueError(f"reprompt_share is {reprompt_share}; it must lie in [0, 1]")
    names = [member.name for member in members]
    rows = []
    for query, scores in zip(queries, correct, strict=True):
        if query.get("split", "train") != "train":
            raise ValueError(f"query {query.get('query_id')!r} is of split {query['split']!r}: train on 'train' only")
        right, wrong = np.flatnonzero(scores >= 1.0), np.flatnonzero(scores < 1.0)
        if not len(right):
            continue
        turn = render(think(query), names[rng.choice(right)], grammar)
        prompt = policy_prompt(query["query"], members, grammar)
        if reprompt is not None and rng.random() < reprompt_share:
            if len(wrong) and rng.random() < 0.5:
                failed = int(rng.choice(wrong))
                action = parse(render(think(query), names[failed], grammar), names, grammar)
                prompt = reprompt(prompt, None, feedback_text(action, float(scores[failed])))
            else:
                prompt = reprompt(prompt, turn, None)
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": turn}]})
    return rows
