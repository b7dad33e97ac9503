"""What routers would make of the queries of a log, in which one member was asked for each: estimates for tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routers.baselines.base import text_of
from routers.baselines.critic import Critic
from routers.baselines.features import Features, unit_rows
from routers.data.table import ReplyTable
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.evaluation.off_policy import CLIP, CUT, Logged, value_of
from routers.evaluation.statistics import Estimate, Paired


def outcomes_of(
    table: ReplyTable, rule: RewardRule, split: str, some: Sequence[int] | np.ndarray | None = None
) -> Outcomes:
    """Recorded outcomes of a split; of a log doubly robust estimates, with what its other split foretells.

    Args:
        some: of the queries, by place; None: all.
    """
    if not table.log:
        return Outcomes.of_table(table, rule, split, some)
    logged, other = (
        Logged.of_table(table, rule, name) for name in (split, "train" if split != "train" else "heldout")
    )
    score, cost = foretold(other, [text_of(item) for item in logged.items])
    rows = np.arange(len(logged.items)) if some is None else np.asarray(some, dtype=int)
    return logged.rows(rows).outcomes(score[rows], cost[rows])


def foretold(known: Logged, queries: Sequence[str]) -> np.ndarray:
    """Score and cost of every member by `Critic`s on the TF-IDF of a log, ``[2, queries, members]``; 0 without one."""
    if not known.items:
        return np.zeros((2, len(queries), len(known.members)))
    texts = [text_of(item) for item in known.items]
    features = Features().fit(texts)
    x, new = (unit_rows(features.view("svd", some)) for some in (texts, list(queries)))
    critics = [Critic(x, known.chosen, seen, len(known.members)) for seen in (known.score, known.costs)]
    return np.stack([new @ critic.theta.T for critic in critics])


def told_by_log(evaluation: Episodes) -> str:
    """Markdown of every router's estimated reward, by each estimator; "": the evaluation is of no log."""
    if CUT not in evaluation.frame:
        return ""
    paired, rows = Paired(evaluation), []
    for name in paired.routers:
        found = value_of(paired, name)
        cells = " | ".join(_shown(one) for one in (found.dr, found.ips, found.snips))
        rows.append(f"| {name} | {cells} | {found.cut:.1%} |")
    head = [
        "| | reward, doubly robust | IPS | self-normalised IPS | cut by the clip |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    told = f"Estimated from {len(paired)} logged decisions, weights at most {CLIP:g}; 95 % intervals over decisions."
    return "\n".join(["**Value on the log**", "", told, "", *head, *rows, ""])


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
