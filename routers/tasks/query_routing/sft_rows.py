"""Rows of the supervised start, made from training queries only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from routers.language.grammar import Grammar, parse, render
from routers.language.prompts import Messages, family_phrase
from routers.tasks.query_routing.world import feedback_text

Reprompt = Callable[[Messages, str | None, str | None], Any]


def sft_turns(
    queries: Sequence[Mapping[str, Any]],
    correct: np.ndarray,
    prompt: Callable[[Mapping[str, Any]], Messages],
    members: Sequence[str],
    grammar: Grammar,
    rng: np.random.Generator,
    *,
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
        prompt: query -> the policy's prompt.
        members: names of the pool, in the order in which the prompt shows it.
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
    rows = []
    for query, scores in zip(queries, correct, strict=True):
        if query.get("split", "train") != "train":
            raise ValueError(f"query {query.get('query_id')!r} is of split {query['split']!r}: train on 'train' only")
        right, wrong = np.flatnonzero(scores >= 1.0), np.flatnonzero(scores < 1.0)
        if not len(right):
            continue
        turn = render(think(query), members[rng.choice(right)], grammar)
        asked = prompt(query)
        if reprompt is not None and rng.random() < reprompt_share:
            if len(wrong) and rng.random() < 0.5:
                failed = int(rng.choice(wrong))
                action = parse(render(think(query), members[failed], grammar), members, grammar)
                asked = reprompt(asked, None, feedback_text(action, float(scores[failed])))
            else:
                asked = reprompt(asked, turn, None)
        rows.append({"prompt": asked, "completion": [{"role": "assistant", "content": turn}]})
    return rows
