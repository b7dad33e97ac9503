"""Score a think/route agent on held-out questions: EM, F1, cost, calls and reward, beside members asked once.

    python scripts/evaluate_think_route.py --config recipes/quickstart/think_route.yaml \
      --model_name_or_path outputs/quickstart/think_route --output_dir outputs/quickstart/think_route_again

The recipe names questions, pool and reward; `agent.yaml` in the checkpoint says how it was trained to ask. Prints the
table and writes `agent_evaluation.json` into the output directory, and what it was made from; a directory with the
results of a training run, or of another evaluation, is refused. Decoding is greedy.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from routers.evaluation.agent_report import (
    AGENT_EVALUATION,
    METRICS,
    AgentEvaluation,
    Line,
    best_per_family,
    single_lines,
)
from routers.evaluation.answers import exact_match, f1, score
from routers.pool import Pool
from routers.tasks.query_routing.evaluate import load_checkpoint
from routers.tasks.think_route.environment import ThinkRoute
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.world import (
    COST_WEIGHT,
    TaskArguments,
    load_questions,
    load_replies,
    make_pool,
    make_rewards,
    make_world,
    prompt_of,
    seen_members,
    with_cost_weight,
)
from srpo import SRPOConfig
from srpo.recipe import load_recipe, resolved_recipe
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, as_columns, play
from srpo.rollout.sampling import Sampling
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.untrusted import without_control_tokens
from srpo.run.derived import made_from, mark, source, unmark
from srpo.run.folder import RunArguments
from srpo.run.results import check_results
from srpo.types import CORRECT, COST, LOST, STOP, Columns

Rewards = tuple[Sequence[Any], Sequence[float]]
BATCH = 128
"""Questions that are played at the same time."""


def play_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: ThinkRoute,
    settings: AgentSettings,
    questions: Sequence[dict[str, Any]],
    step_seconds: float = 60.0,
) -> Columns:
    """Greedy episodes of all questions, in order; the model's mode is left as it was."""
    clean = without_control_tokens(tokenizer)
    rows = [{**q, "prompt": prompt_of(q, settings, world.members, clean)} for q in questions]
    prompts = [
        tokenizer.apply_chat_template(
            row["prompt"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **settings.chat_template_kwargs,
        )
        for row in rows
    ]
    generator = TransformersGenerator(
        model,
        tokenizer,
        Sampling(temperature=0.0, stop=settings.grammar.stops),
        eos_ids=end_ids(model, tokenizer),
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
    return {COST_WEIGHT: [q[COST_WEIGHT] for q in questions]} if COST_WEIGHT in questions[0] else {}


def ask_once(
    pool: Pool, names: Sequence[str], questions: Sequence[dict[str, Any]], metric: str, seconds: float
) -> dict[str, Columns]:
    """Each member once per question, its reply taken for the final answer: member -> columns of an episode."""

    async def ask_all() -> list[list[Any]]:
        async with pool:
            jobs = [
                asyncio.gather(*(pool.ask(n, q["query"], seconds, query_id=q["query_id"]) for q in questions))
                for n in names
            ]
            return await asyncio.gather(*jobs)

    found = {}
    for name, replies in zip(names, asyncio.run(ask_all()), strict=True):
        texts = [reply.text.strip() for reply in replies]
        found[name] = {
            CORRECT: [score(t or None, q["gold"], metric) for t, q in zip(texts, questions, strict=True)],  # type: ignore[arg-type]
            "em": [exact_match(t, q["gold"]) if t else 0.0 for t, q in zip(texts, questions, strict=True)],
            "f1": [f1(t, q["gold"]) for t, q in zip(texts, questions, strict=True)],
            COST: [pool.price(name, reply.usage) for reply in replies],
            "calls": [1] * len(texts),
            "answer": texts,
            "format_error": [""] * len(texts),
            "invalid_actions": [0] * len(texts),
            LOST: [reply.error for reply in replies],
            **_sensitivities(questions),
        }
    return found


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
    train: Sequence[dict[str, Any]] = (),
    baselines: bool = True,
    note: str = "",
) -> AgentEvaluation:
    """The policy on these questions; with `baselines` also every member asked once (which a live pool bills).

    Args:
        train: training questions, for the line "best per family"; empty: no such line.
        name: how tables call the policy.

    Raises:
        ValueError: the pool failed on every question.
    """
    columns = play_questions(model, tokenizer, world, settings, questions)
    singles = ask_once(world.pool, world.names, questions, world.metric, world.call_seconds) if baselines else {}
    failed = [
        any(cause is not None for cause in causes)
        for causes in zip(columns[LOST], *(s[LOST] for s in singles.values()), strict=True)
    ]
    kept = [i for i, lost in enumerate(failed) if not lost]
    if not kept:
        raise ValueError(f"the pool failed on all {len(questions)} questions; first: {columns[LOST][0]}")
    columns, singles = _select(columns, kept), {member: _select(s, kept) for member, s in singles.items()}
    families = [questions[i]["family"] for i in kept]
    lines = [Line(name, "policy", {m: [float(x) for x in v] for m, v in _values(columns, rewards).items()})]
    if singles:
        best = None
        if train:
            trained = ask_once(world.pool, world.names, train, world.metric, world.call_seconds)
            scored = {member: total_reward(s, rewards) for member, s in trained.items()}
            best = best_per_family(world.names, scored, [row["family"] for row in train])
        values = {member: _values(s, rewards) for member, s in singles.items()}
        lines += single_lines(world.names, values, families, best)
    calls = Counter(member for asked in columns["members"] for member in asked)
    stops = Counter(columns[STOP])
    return AgentEvaluation(
        questions=[questions[i]["query_id"] for i in kept],
        families=families,
        lines=lines,
        members={member: calls[member] / max(1, calls.total()) for member in world.names},
        stops={stop: count / len(kept) for stop, count in stops.most_common()},
        lost=len(failed) - len(kept),
        note=note,
    )


def _values(columns: Columns, rewards: Rewards) -> dict[str, np.ndarray]:
    values = {metric: np.array(columns[metric], dtype=float) for metric in METRICS if metric != "reward"}
    return {**values, "reward": total_reward(columns, rewards)}


def _select(columns: Columns, rows: Sequence[int]) -> Columns:
    return {name: [values[i] for i in rows] for name, values in columns.items()}


def main(argv: Sequence[str] | None = None) -> AgentEvaluation:
    """Command line; returns the evaluation that it wrote."""
    recipe = load_recipe((TaskArguments, RunArguments, SRPOConfig), argv)
    task, _, args = recipe
    output = Path(args.output_dir)
    contents = {f"{key}_content": source(getattr(task, key)) for key in ("model_name_or_path", "table", "catalogue")}
    told = {key: value for key, value in resolved_recipe(recipe).items() if key not in ("output_dir", "overwrite")}
    made = made_from(**told, **contents)
    check_results(output, AGENT_EVALUATION, made)
    model, tokenizer = load_checkpoint(task.model_name_or_path)
    settings = AgentSettings.load(task.model_name_or_path)
    table = load_replies(task, output)
    train, heldout = load_questions(task, table, output)
    pool = make_pool(task, table, args.max_cost_usd)
    world = make_world(task, settings, pool, seen_members(task, pool), tokenizer)
    evaluation = evaluate_agent(
        model,
        tokenizer,
        world,
        settings,
        [with_cost_weight(row, settings) for row in heldout],
        make_rewards(task, world.members),
        name="policy",
        train=[with_cost_weight(row, settings) for row in train] if task.pool == "recorded" else (),
    )
    unmark(output / AGENT_EVALUATION)
    path = evaluation.write(output)
    mark(output / AGENT_EVALUATION, made)
    print(evaluation.text(), path, sep="\n\n")
    return evaluation
