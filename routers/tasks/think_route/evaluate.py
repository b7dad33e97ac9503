"""A think/route agent on held-out questions, beside members that are asked the question itself, once.

The agent writes its own final answer; under single members and the rules over them the member's reply *is* the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from routers.baselines.play import play_baselines
from routers.data.table import ReplyTable
from routers.evaluation.answers import Metric, exact_match, f1, score
from routers.evaluation.episodes import LOST as LOST_STOP
from routers.evaluation.episodes import THEN, Episodes, Outcomes, named_as
from routers.language.prompts import COST_WEIGHT
from routers.pool.reasoning import split_reasoning
from routers.tasks.think_route.environment import ThinkRoute
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.world import prompt_of
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, as_columns, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import ALL_TOKENS
from srpo.types import CORRECT, COST, LOST, STOP, Columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rewards = tuple[Sequence[Any], Sequence[float]]
"""Reward functions and their weights."""
BATCH = 128
"""Questions that are played at the same time."""
HEADER = {
    "task": "think_route",
    "split": "heldout",
    "item": "question",
    "score": "right answers",
    "note": "The agent writes its own final answer. For single members and the rules over them, one member is asked "
    "the question itself, once, and its reply is the final answer.",
}


def play_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: ThinkRoute,
    settings: AgentSettings,
    questions: Sequence[dict[str, Any]],
    step_seconds: float = 60.0,
) -> Columns:
    """Greedy episodes of all questions, in order; the model's mode is left as it was.

    Args:
        model, tokenizer: the policy.
        world: asks members and reads actions.
        settings: the policy's prompt and limits.
        questions: rows of the world.
        step_seconds: that the calls of one turn may take.
    """
    actions = settings.actions(world.members, tokenizer)
    rows = [{**q, "prompt": prompt_of(q, actions)} for q in questions]
    prompts = [actions.ids(row["prompt"]) for row in rows]
    generator = TransformersGenerator(
        model,
        tokenizer,
        Sampling(temperature=0.0, stop=actions.stops),
        eos_ids=end_ids(model, tokenizer),
        allowed=actions.mask(tokenizer).state(),
        keep_tokens=ALL_TOKENS,
    )
    limits = Limits(
        turns=settings.turns,
        tokens=settings.tokens,
        turn_tokens=settings.turn_tokens,
        observation_tokens=settings.observation_tokens,
        step_seconds=step_seconds,
    )
    was_training = model.training
    model.eval()
    trajectories = []
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        seeds = [f"evaluation:{i}" for i in range(start, min(start + BATCH, len(rows)))]
        trajectories += play(world, rows[part], prompts[part], seeds, generator, tokenizer, limits)
    model.train(was_training)
    return {**as_columns(trajectories), **_sensitivities(questions)}


def _sensitivities(questions: Sequence[dict[str, Any]]) -> Columns:
    return {COST_WEIGHT: [q[COST_WEIGHT] for q in questions]} if questions and COST_WEIGHT in questions[0] else {}


def total_reward(columns: Columns, rewards: Rewards) -> np.ndarray:
    """The training reward of finished episodes, ``[questions]``."""
    functions, weights = rewards
    completions = [""] * len(columns[COST])
    parts = [np.array(function(completions, **columns), dtype=float) for function in functions]
    return np.asarray(np.sum([w * part for w, part in zip(weights, parts, strict=True)], axis=0))


def evaluate_agent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: ThinkRoute,
    settings: AgentSettings,
    questions: Sequence[dict[str, Any]],
    rewards: Rewards,
    *,
    name: str,
) -> Episodes:
    """The policy on these questions, greedily; questions that the pool failed on are lost.

    Args:
        model, tokenizer: the policy; its mode is left as it was.
        world: whom it may ask.
        settings: how it is asked.
        questions: with `gold`; `cost_weight` where prompts state one.
        rewards: of the training.
        name: how tables call the policy (`routers.evaluation.episodes.named_as`).

    Raises:
        ValueError: the pool failed on every question.
    """
    columns = play_questions(model, tokenizer, world, settings, questions)
    lost = np.array([cause is not None for cause in columns[LOST]])
    if len(lost) and lost.all():
        raise ValueError(f"the pool failed on all {len(questions)} questions; first: {columns[LOST][0]}")
    kept = np.flatnonzero(~lost)
    reward = np.full(len(lost), np.nan)
    reward[kept] = total_reward({n: [values[i] for i in kept] for n, values in columns.items()}, rewards)
    kind, curve = named_as(name)
    known = {
        metric: np.where(lost, np.nan, np.array(columns[column], dtype=float))
        for metric, column in {"score": CORRECT, "usd": COST, "em": "em", "f1": "f1", "calls": "calls"}.items()
    }
    frame = pd.DataFrame(
        {
            **_items(questions),
            **known,
            "router": name,
            "kind": kind,
            "curve": curve,
            "reward": reward,
            "member": [THEN.join(asked or ()) for asked in columns["members"]],
            "stop": np.where(lost, LOST_STOP, columns[STOP]),
            "seconds": np.array(columns["seconds"], dtype=float),
            "valid": [float(not error) for error in columns["format_error"]],
        }
    )
    return Episodes(frame, HEADER)


def agent_baselines(
    table: ReplyTable,
    names: Sequence[str],
    questions: Sequence[dict[str, Any]],
    train: Sequence[dict[str, Any]],
    rewards: Rewards,
    *,
    metric: Metric,
) -> Episodes:
    """Members asked once each and rules over them, by what the table has recorded.

    Args:
        table: with replies.
        names: of the members that may be asked.
        questions: to answer; with `gold`.
        train: questions that rules are fitted on.
        rewards: of the training.
        metric: how answers are graded.
    """
    items = asked_once(table, names, questions, rewards, metric)
    return play_baselines(items, asked_once(table, names, train, rewards, metric) if train else None, HEADER)


def asked_once(
    table: ReplyTable, names: Sequence[str], questions: Sequence[dict[str, Any]], rewards: Rewards, metric: Metric
) -> Outcomes:
    """What each member's recorded reply to each question is worth as the final answer.

    Args:
        table: the replies.
        names: of the members.
        questions: of the table.
        rewards: functions and weights of the training.
        metric: what a right answer is.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("score", "usd", "reward", "em", "f1")}
    for name in names:
        recorded = [table.lookup(question["query_id"], name) for question in questions]
        texts = [split_reasoning(reply.reply)[0].strip() for reply in recorded]
        both = list(zip(texts, (question["gold"] for question in questions), strict=True))
        columns: Columns = {
            CORRECT: [score(text or None, gold, metric) for text, gold in both],
            "em": [exact_match(text, gold) if text else 0.0 for text, gold in both],
            "f1": [f1(text, gold) for text, gold in both],
            COST: [reply.cost for reply in recorded],
            "calls": [1] * len(texts),
            "answer": texts,
            "format_error": [""] * len(texts),
            "invalid_actions": [0] * len(texts),
            LOST: [None] * len(texts),
            **_sensitivities(questions),
        }
        values = {"score": columns[CORRECT], "usd": columns[COST], "reward": total_reward(columns, rewards)}
        for key, column in {**values, "em": columns["em"], "f1": columns["f1"]}.items():
            found[key].append(np.array(column, dtype=float))
    stacked = {key: np.stack(columns, axis=1) for key, columns in found.items()}
    extra = {key: stacked[key] for key in ("em", "f1")}
    return Outcomes(questions, names, stacked["score"], stacked["usd"], stacked["reward"], extra)


def _items(questions: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    return {
        "item": [str(question["query_id"]) for question in questions],
        "family": [question.get("family", "") for question in questions],
        "query": [question["query"] for question in questions],
    }
