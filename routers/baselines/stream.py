"""Plays online routers on a stream of queries, of which each shows the outcome of the member that was asked only."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from routers.baselines.base import text_of
from routers.baselines.features import has_minilm
from routers.baselines.online import OnlineRouter, OnlineSettings, learners
from routers.data.catalogue import Member
from routers.evaluation.episodes import Episodes, Outcomes
from routers.evaluation.statistics import Estimate, Paired
from routers.router import Decision, Router

STREAM = "stream"
"""`set` of the episodes on the stream."""
ORDERS = range(100, 104)
"""Seeds by which settings are chosen."""
VIEWS: tuple[Mapping[str, float], ...] = ({}, {"minilm": 1})
"""Of the query, that are tried with all settings of a grid."""
OURS = "logistic, optimistic"
"""The learner that others are compared with."""


@dataclass(frozen=True)
class Stream:
    """What a router did on a stream, each ``[T]`` in the order of the stream.

    `order`: places of the items; `chosen`: columns of the members; `chance`: with what probability they were chosen
    (1 for a router that gives none); `reward`: of the choice, `best` of the best member of the item, `single` of the
    member that is best over the whole stream.
    """

    order: np.ndarray
    chosen: np.ndarray
    chance: np.ndarray
    reward: np.ndarray
    best: np.ndarray
    single: np.ndarray

    def regret(self, to: str = "best") -> np.ndarray:
        """Cumulative: what `best` (the oracle) or `single` had earned more until then."""
        return np.asarray(np.cumsum(getattr(self, to) - self.reward))


def play_stream(router: Router, outcomes: Outcomes, order_seed: int = 0) -> Stream:
    """Show items one by one in a random order; of each `router.update` learns what its own choice brought.

    Args:
        outcomes: of every member; all but that of the member that was asked stay hidden.
        order_seed: of the order.

    Raises:
        ValueError: an item without text, or a decision that asks nobody or several.
    """
    order = np.random.default_rng(order_seed).permutation(len(outcomes.items))
    column = {member: i for i, member in enumerate(outcomes.members)}
    chosen, chance = np.zeros(len(order), int), np.ones(len(order))
    for step, item in enumerate(order):
        query = text_of(outcomes.items[item])
        decision: Decision = router.route(query)
        if len(decision.members) != 1:
            raise ValueError(f"{router.name} asks {decision.members}; a stream needs one member for each query")
        [member] = decision.members
        chosen[step], chance[step] = column[member], decision.scores.get(member, 1.0)
        known = {name: float(getattr(outcomes, name)[item, column[member]]) for name in ("score", "usd")}
        router.update(query, decision, known)
    shown = outcomes.reward[order]
    single = shown[:, shown.mean(axis=0).argmax()]
    return Stream(order, chosen, chance, shown[np.arange(len(order)), chosen], shown.max(axis=1), single)


def play_online(
    learner: str,
    stream: Outcomes,
    heldout: Outcomes,
    seeds: Sequence[int] = range(5),
    how: Mapping[str, float] | None = None,
    like: OnlineRouter | None = None,
) -> tuple[Episodes, list[Stream]]:
    """A learner on `stream`, in another order for every seed, and then, exploring no more, on `heldout`.

    Args:
        learner: a key of `learners()`.
        how: its settings; None: those of its class.
        like: a router whose features are used.

    Returns:
        Episodes of both sets (the stream's is called `STREAM`), and the streams.
    """
    parts, streams = [], []
    for seed in seeds:
        router = online_router(learner, stream, how or {}, seed, like)
        played = play_stream(router, stream, seed)
        back = np.empty_like(played.chosen)
        back[played.order] = played.chosen
        live = stream.play(learner, "learned", [stream.members[i] for i in back], seed=seed)
        router.explores = False
        router.contexts([text_of(item) for item in heldout.items])  # all at once is faster
        routes = [router.route(text_of(item)).member for item in heldout.items]
        parts += [Episodes(live.frame.assign(set=STREAM)), heldout.play(learner, "learned", routes, seed=seed)]
        streams.append(played)
    return Episodes.merged(parts), streams


def online_router(
    learner: str, stream: Outcomes, how: Mapping[str, float], seed: int = 0, like: OnlineRouter | None = None
) -> OnlineRouter:
    """A router that has not learned anything yet. Outcomes without a rule of the reward cannot be learned from."""
    if stream.rule is None:
        raise ValueError("the outcomes say not by which rule they are rewarded")
    members = tuple(Member(name, name) for name in stream.members)
    settings = OnlineSettings(learner, members, stream.rule, dict(how), seed)
    return OnlineRouter(settings, [text_of(item) for item in stream.items], like)


def chosen_settings(learner: str, known: Outcomes, like: OnlineRouter | None = None) -> Mapping[str, float]:
    """The settings that earn most on `known` as a stream, the mean of `ORDERS`: of a learner's grid, with MiniLM's
    embedding, where it is installed, and without."""

    def earned(how: Mapping[str, float]) -> float:
        routers = ((online_router(learner, known, how, order, like), order) for order in ORDERS)
        return float(np.mean([play_stream(router, known, order).reward.mean() for router, order in routers]))

    grid = [{**how, **view} for how in learners()[learner].grid for view in VIEWS[: 1 + has_minilm()]]
    return grid[0] if len(grid) == 1 else max(grid, key=earned)


def play_learners(
    known: Outcomes, heldout: Outcomes, seeds: Sequence[int], names: Sequence[str], tell: Callable[[str], object]
) -> tuple[Episodes, dict[str, list[Stream]], dict[str, Mapping[str, float]]]:
    """`play_online` of several learners with one set of features: three quarters of `known` are the stream, and the
    others are another one, on which each learner's settings are chosen, of all alike. `tell` is told each name.

    Returns:
        Episodes, streams and settings.
    """
    rows = np.random.default_rng(0).permutation(len(known.items))
    other, stream = (known.rows(np.sort(part)) for part in np.split(rows, [len(rows) // 4]))
    parts, streams, chosen, like = [], {}, {}, None
    for view in VIEWS[: 1 + has_minilm()]:  # fitted on all texts
        like = online_router(names[0], known, view, like=like)
    for name in names:
        tell(name)
        chosen[name] = chosen_settings(name, other, like)
        episodes, streams[name] = play_online(name, stream, heldout, seeds, chosen[name], like)
        parts.append(episodes)
    return Episodes.merged(parts), streams, chosen


def stream_table(episodes: Episodes, ours: str, chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of rewards on the stream, and afterwards on held-out queries, with what `ours` earns more (paired)."""
    parts = [Paired(episodes.of(set=name)) for name in (STREAM, "")]
    places = ["stream", "held-out queries afterwards"]
    head = "".join(f" | reward, {place} | {ours} minus it" for place in places)
    lines = [f"|{head} | settings |", "| --- " + "| ---: " * 2 * len(parts) + "| --- |"]
    for name in sorted(parts[0].routers, key=lambda name: -parts[0].mean(name, "reward")):
        cells = []
        for part in parts:
            cells.append(_interval(part.estimate(name, "reward"), ""))
            cells.append("-" if name == ours else _interval(part.difference(ours, name, "reward"), "+"))
        how = ", ".join(f"{setting} {value:g}" for setting, value in chosen[name].items())
        lines.append(f"| {name} | {' | '.join(cells)} | {how} |")
    return "\n".join(lines)


def _interval(found: Estimate, sign: str) -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def regret_picture(streams: Mapping[str, Sequence[Stream]], title: str = "") -> bytes:
    """PNG of the regret to the oracle: the mean over seeds with its 95 % interval (normal, of the seeds)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.4), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    for name, played in streams.items():
        curves = np.array([one.regret() for one in played])
        mean, steps = curves.mean(axis=0), np.arange(1, curves.shape[1] + 1)
        half = 1.96 * curves.std(axis=0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else 0 * mean
        [line] = axes.plot(steps, mean, label=f"{name}: {mean[-1]:.0f}", linewidth=1.6)
        axes.fill_between(steps, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    first = next(iter(streams.values()))
    single = np.mean([np.cumsum(one.best - one.single) for one in first], axis=0)
    axes.plot(np.arange(1, len(single) + 1), single, "--", color="#666666", label=f"best single: {single[-1]:.0f}")
    axes.set_xlabel("queries")
    axes.set_ylabel("cumulative regret to the oracle")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
