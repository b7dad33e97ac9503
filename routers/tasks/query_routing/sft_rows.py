"""Rows of the supervised start, made from training queries only.

    p(m | q) = softmax_m(u_qm / temperature)        u_qm = correct - cost_weight * min(usd / cost_scale, 1)

A row's turn names a member, and the label of its name is p, so what is learned is the expectation of p given the
query's text: a policy that knows who can answer and what it costs, unsharp where the outcomes are. Queries that nobody
answers count too: they teach to be cheap. Labels drawn among the right members alone would teach how often each is
right, whatever the query, and RL would sharpen that onto the best single member.

The higher the temperature, the nearer is the order of E[p] to that of E[u], which is what the greedy policy needs
(p = 1/M + (u - mean u) / (M temperature) + ...): at 0.1 a cheap member that is right most of the time is preferred to
a dear one that is right more often, by far. It starts less sharp, and RL sharpens it.

One recorded outcome is partly chance. `foretold` is what the other queries say of it: with a share s of its labels the
policy imitates  (1 - s) p + s p(u foretold).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

from routers.baselines.base import Data
from routers.baselines.ridge import Ridge
from routers.evaluation.episodes import Outcomes
from routers.language.grammar import Grammar, parse, render
from routers.language.prompts import Messages, family_phrase
from routers.tasks.query_routing.world import feedback_text
from srpo.task import Ids

if TYPE_CHECKING:
    from srpo.rollout.constrained import OneOf

Reprompt = Callable[[Messages, str | None, str | None], Any]


def soft_labels(utility: np.ndarray, temperature: float) -> np.ndarray:
    """p of the formula above: utilities [Q, M] -> probabilities [Q, M]."""
    return np.asarray(softmax(utility / temperature, axis=1))


def foretold(known: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Correctness and USD, both [Q, M], by ridge regressions on TF-IDF that are fitted and tuned without a query's
    fifth of the queries."""
    assert known.rule is not None
    score, usd = np.zeros_like(known.score), np.zeros_like(known.usd)
    for part, others, own in Data.of(known).folds:
        told = Ridge().fit(others).foretell(own)
        score[part], usd[part] = told.score, told.usd * known.rule.cost_scale
    return score, usd


def thinned(query: str, dropout: float, rng: np.random.Generator) -> str:
    """The query without some of its words, each left out with the probability `dropout`; at least one stays."""
    words = query.split(" ")
    kept = [word for word in words if rng.random() >= dropout]
    return " ".join(kept) or query


def drawn(probabilities: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Members [Q, draws] of probabilities [Q, M]: each draw has them for itself, and those of a query together come
    as near to them as whole numbers can (systematic sampling)."""
    points = (rng.random((len(probabilities), 1)) + np.arange(draws)) / draws
    upper = probabilities.cumsum(axis=1)[:, :-1]  # the last one's is 1, but for rounding
    return np.asarray((points[:, :, None] > upper[:, None, :]).sum(axis=2))


def sft_turns(
    queries: Sequence[Mapping[str, Any]],
    correct: np.ndarray,
    utility: np.ndarray,
    prompt: Callable[[Mapping[str, Any]], Messages],
    members: Sequence[str],
    grammar: Grammar,
    rng: np.random.Generator,
    *,
    temperature: float = 0.1,
    guessed: np.ndarray | None = None,
    share: float = 0.0,
    draws: int = 1,
    success: float = 0.5,
    reprompt: Reprompt | None = None,
    reprompt_share: float = 0.25,
    think: Callable[[Mapping[str, Any]], str] = family_phrase,
) -> list[dict[str, Any]]:
    """`draws` turns per query, a query's one after the other, by members drawn from `soft_labels`: prompt, completion,
    and `label`, member -> probability.

    Args:
        queries: ``query``, ``family`` (see ``think``) and ``split``; a held-out query is refused.
        correct: ``[len(queries), len(members)]``, 0 to 1.
        utility: of the same shape, what the reward will be.
        prompt: query -> the policy's prompt.
        members: names of the pool, in the order in which the prompt shows it.
        grammar: the tags of the action.
        rng: draws members and forms; the same generator state gives the same rows.
        guessed: utilities that are foretold, of which this `share` of the labels is made.
        success: utility from which a turn is a right one, which may be shown (``success_reward_threshold``).
        reprompt: ``(prompt, demonstration, feedback) -> prompt`` in the self-teacher's words. A policy that starts
            from nothing must have seen that form, or its teacher cannot use it. ``None``: no such rows.
        reprompt_share: probability that a turn is asked for in the reprompted form: half of these with the turn
            itself as demonstration, if it is a right one (then the label is this member), and half with feedback on
            another member that was not fully right. Where there is neither, the prompt is the plain one.
        think: the reasoning for a query.

    Raises:
        ValueError: shapes differ, a share outside [0, 1], or a query of the held-out split.
    """
    shape = (len(queries), len(members))
    if correct.shape != shape or utility.shape != shape:
        raise ValueError(f"correct {correct.shape} and utility {utility.shape} are not (queries, members) {shape}")
    if not 0 <= reprompt_share <= 1:
        raise ValueError(f"reprompt_share is {reprompt_share}; it must lie in [0, 1]")
    rows = []
    labels = soft_labels(utility, temperature)
    if guessed is not None:
        labels = (1 - share) * labels + share * soft_labels(guessed, temperature)
    for i, (query, chosen) in enumerate(zip(queries, drawn(labels, draws, rng), strict=True)):
        if query.get("split", "train") != "train":
            raise ValueError(f"query {query.get('query_id')!r} is of split {query['split']!r}: train on 'train' only")
        for member in chosen:
            turn, asked = render(think(query), members[member], grammar), prompt(query)
            label = labels[i]
            if reprompt is not None and rng.random() < reprompt_share:
                failed = np.setdiff1d(np.flatnonzero(correct[i] < 1.0), [member])
                if len(failed) and rng.random() < 0.5:
                    other = int(rng.choice(failed))
                    action = parse(render(think(query), members[other], grammar), members, grammar)
                    asked = reprompt(asked, None, feedback_text(action, float(correct[i, other])))
                elif utility[i, member] >= success:
                    asked, label = reprompt(asked, turn, None), np.eye(len(members))[member]
            completion = [{"role": "assistant", "content": turn}]
            known = dict(zip(members, label.tolist(), strict=True))
            rows.append({"prompt": asked, "completion": completion, "label": known})
    return rows


def with_soft_label(example: Ids, mask: OneOf, label: Mapping[str, float]) -> Ids:
    """An encoded turn (`srpo.sft.encode_turn`) whose name has the probabilities of `label` in place of one id."""
    ids, labels = example["input_ids"], list(example["labels"])
    start = next(i for i, known in enumerate(labels) if known != -100)
    soft = [(start + place, i, p) for place, i, p in mask.targets(ids[start:], label)]
    for place, _, _ in soft:
        labels[place] = -100
    return {"input_ids": ids, "labels": labels, "soft": soft}
