"""Plays online routers on a stream of queries, of which each shows the outcome of the member that was asked only."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from routers.baselines.base import text_of
from routers.baselines.online import OnlineRouter, OnlineSettings, learners
from routers.data.catalogue import Member
from routers.evaluation.episodes import Episodes, Outcomes
from routers.evaluation.statistics import Estimate, Paired
from routers.router import Decision, Router

STREAM = "stream"
"""`set` of the episodes on the stream."""
OURS = "policy gradient"
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
        how: its settings; None: `chosen_settings`.
        like: a router whose features are used.

    Returns:
        Episodes of both sets (the stream's is called `STREAM`), and the streams.
    """
    how = chosen_settings(learner, stream, like) if how is None else how
    parts, streams = [], []
    for seed in seeds:
        router = online_router(learner, stream, how, seed, like)
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


def chosen_settings(learner: str, stream: Outcomes, like: OnlineRouter | None = None) -> Mapping[str, float]:
    """The settings of a learner's grid that earn most: on four fifths of the items as a stream, plus on the last fifth
    afterwards. Two orders; the items are those of the stream, so that the held-out ones stay unseen."""
    grid = learners()[learner].grid
    if len(grid) == 1:
        return grid[0]
    rows = np.random.default_rng(len(stream.items)).permutation(len(stream.items))
    cut = len(rows) // 5
    late, early = stream.rows(rows[:cut]), stream.rows(rows[cut:])

    def earned(how: Mapping[str, float]) -> float:
        episodes, _ = play_online(learner, early, late, (100, 101), how, like)
        return float(episodes.frame.groupby("set")["reward"].mean().sum())

    return max(grid, key=earned)


def play_learners(
    stream: Outcomes, heldout: Outcomes, seeds: Sequence[int], names: Sequence[str], tell: Callable[[str], object]
) -> tuple[Episodes, dict[str, list[Stream]]]:
    """`play_online` of several learners with one set of features, at the settings that their classes have: nothing is
    chosen on this stream. `tell` is told the name of each."""
    parts, streams, like = [], {}, None
    for name in names:
        tell(name)
        like = like or online_router(name, stream, {})
        episodes, streams[name] = play_online(name, stream, heldout, seeds, {}, like)
        parts.append(episodes)
    return Episodes.merged(parts), streams


def stream_table(episodes: Episodes, ours: str) -> str:
    """Markdown of rewards on the stream, and afterwards on held-out queries, with what `ours` earns more (paired)."""
    parts = [Paired(episodes.of(set=name)) for name in (STREAM, "")]
    places = ["stream", "held-out queries afterwards"]
    head = "".join(f" | reward, {place} | {ours} minus it" for place in places)
    lines = [f"|{head} |", "| --- " + "| ---: " * 2 * len(parts) + "|"]
    for name in sorted(parts[0].routers, key=lambda name: -parts[0].mean(name, "reward")):
        cells = []
        for part in parts:
            cells.append(_interval(part.estimate(name, "reward"), ""))
            cells.append("-" if name == ours else _interval(part.difference(ours, name, "reward"), "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
