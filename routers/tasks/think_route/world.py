"""What a think/route recipe names: questions, pool, settings, environment, rewards."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.schemes import additive_rewards, router_r1_rewards, xrouter_rewards
from routers.data.catalogue import Member, load_catalogue
from routers.data.questions import load_qa, without_duplicates
from routers.data.table import ReplyTable, replies_of, spread
from routers.data.typical import seen_in
from routers.evaluation.answers import gold_problem
from routers.language.actions import Actions
from routers.language.prompts import COST_WEIGHT, Messages
from routers.pool import Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.tasks.think_route.arguments import ThinkRouteArguments
from routers.tasks.think_route.environment import ThinkRoute, cost_scale
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.sft_rows import restricted, result_of
from srpo.config import SRPOConfig
from srpo.quarantine import Quarantine
from srpo.task import RunArguments


def load_replies(task: ThinkRouteArguments, run: RunArguments, folder: Path) -> ReplyTable | None:
    """The table of the task, with short replies where the task says so; None: it has none. Its bad rows are written
    into `folder`."""
    if task.table is None:
        return None
    # With endpoints, the catalogue is theirs; the table's own prices are the recorded members'.
    prices = task.catalogue if task.pool == "recorded" else None
    table = replies_of(
        task.table, prices, folder=folder, max_bad_share=run.max_bad_share, drop_incomplete=task.drop_incomplete
    )
    return restricted(table, task.members, result_of if task.replies == "result" else None)


def load_questions(
    task: ThinkRouteArguments, run: RunArguments, table: ReplyTable | None, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) questions: `query_id, query, gold, family, split`. Bad ones are written into `folder`.

    Raises:
        BadRows: too many that cannot be read, or that the metric cannot grade.
    """
    bad = (folder, run.max_bad_share)
    if table is not None:
        train = _table_rows(table, "train", run.train_limit)
        heldout = _table_rows(table, "heldout", run.heldout_limit)
    else:
        heldout = _sets(task.test_data or [], "heldout", run.heldout_limit, task.question_seed, bad)
        train = _sets(task.train_data or [], "train", run.train_limit, task.question_seed, bad)
        train = without_duplicates(train, heldout)
    if not heldout:
        raise ValueError("there is no held-out question to evaluate on: give the table a split heldout, or other sets")
    return _gradable(train, "train", task.metric, bad), _gradable(heldout, "heldout", task.metric, bad)


def _table_rows(table: ReplyTable, split: str, limit: int | None) -> list[dict[str, Any]]:
    rows = table.queries(split)
    return [{**rows[i], "gold": list(table.gold(rows[i]["query_id"]))} for i in spread(len(rows), limit)]


def _sets(
    names: Sequence[str], split: str, limit: int | None, seed: int, bad: tuple[Path, float]
) -> list[dict[str, Any]]:
    rows = []
    for number, name in enumerate(names):
        rows += load_qa(
            name,
            split,
            limit=limit,
            seed=seed,
            max_bad_share=bad[1],
            quarantine_path=bad[0] / f"quarantine_{split}_{number}.jsonl",
        )
    return rows


def _gradable(rows: list[dict[str, Any]], split: str, metric: str, bad: tuple[Path, float]) -> list[dict[str, Any]]:
    """The rows whose accepted answers the metric can compare with: any other would pay nobody, in silence."""
    left_out = Quarantine(f"{split} questions", bad[0] / f"quarantine_{split}.jsonl", bad[1])
    good = []
    for number, row in enumerate(rows, start=1):
        if problem := gold_problem(row["gold"], metric):  # type: ignore[arg-type]  # checked by ThinkRoute
            left_out.add(number, f"no answer for metric {metric}", f"query {row['query_id']!r}: {problem}", row)
        else:
            good.append(row)
    left_out.settle(len(rows))
    return good


def make_pool(
    task: ThinkRouteArguments, run: RunArguments, table: ReplyTable | None, max_cost_usd: float | None = None
) -> Pool:
    """The pool with all members that the task names, the unseen ones too."""
    ledger = Ledger(max_cost_usd, (run.policy_price_in, run.policy_price_out))
    if task.pool == "recorded":
        assert table is not None
        return recorded_pool(table, ledger=ledger)
    catalogue = load_catalogue(task.catalogue or "")
    names = task.members or list(catalogue)
    if unknown := [name for name in names if name not in catalogue]:
        raise ValueError(f"{task.catalogue}: there is no member {unknown[0]!r}; there are {', '.join(catalogue)}")
    cache = ReplyCache(task.reply_cache) if task.reply_cache else None
    options: dict[str, Any] = {} if task.agent_prompt is None else {"agent_prompt": task.agent_prompt}
    return live_pool({name: catalogue[name] for name in names}, ledger=ledger, cache=cache, **options)


def seen_members(task: ThinkRouteArguments, pool: Pool) -> list[str]:
    """Names that the policy trains with."""
    unseen = task.unseen_members or []
    if unknown := [name for name in unseen if name not in pool.members]:
        raise ValueError(f"unseen member {unknown[0]!r} is not in the pool; it has {', '.join(pool.members)}")
    return [name for name in pool.members if name not in unseen]


def make_settings(
    task: ThinkRouteArguments, args: SRPOConfig, members: Sequence[Member], table: ReplyTable | None = None
) -> AgentSettings:
    """How the policy asks, as the recipe says; what members' calls cost, as their table does."""
    return AgentSettings(
        prompt=task.prompt,  # type: ignore[arg-type]  # checked there
        action_format=task.action_format,  # type: ignore[arg-type]
        forward_empty=task.forward_empty,
        turns=args.max_turns,
        tokens=args.max_completion_length,
        turn_tokens=args.max_turn_tokens,
        observation_tokens=args.max_observation_tokens,
        chat_template_kwargs=args.chat_template_kwargs or {},
        cost_weights=tuple(task.cost_weights or ()),
        members=tuple(members),
        **({} if table is None else seen_in(table)),
    )


def make_world(
    task: ThinkRouteArguments, settings: AgentSettings, pool: Pool, names: Sequence[str], tokenizer: Any, priced: bool
) -> ThinkRoute:
    """The environment.

    Args:
        task: the recipe's keys.
        settings: prompt, grammar and limits of the policy.
        pool: who answers.
        names: of the members that may be asked.
        tokenizer: of the policy.
        priced: the policy's own tokens cost something.
    """
    own = copy.deepcopy(tokenizer)  # steps read and count while the policy writes, in another thread
    return ThinkRoute(
        pool,
        settings.actions([pool.members[name] for name in names], own),
        metric=task.metric,  # type: ignore[arg-type]  # checked there
        failed_call=task.failed_call,  # type: ignore[arg-type]
        call_seconds=task.call_seconds,
        count_tokens=(lambda text: len(own.encode(text, add_special_tokens=False))) if priced else None,
    )


def make_rewards(task: ThinkRouteArguments, members: Sequence[Member]) -> tuple[list[Any], list[float]]:
    """Reward functions and their weights."""
    scale = task.cost_scale_usd or cost_scale(members)
    weight = None if task.cost_weights else task.cost_weight  # None: each row's own
    if task.reward == "router_r1":
        return router_r1_rewards(scale, weight)
    if task.reward == "xrouter":
        return xrouter_rewards(scale, task.cost_weight)
    return additive_rewards(scale, weight, task.format_weight)


def prompt_of(row: Mapping[str, Any], actions: Actions) -> Messages:
    """The prompt of a question, with the price sensitivity that it has."""
    return actions.prompt(row["query"], row.get(COST_WEIGHT))
