"""Means, paired differences and frontiers of played episodes, with 95 % intervals.

Every interval is a percentile bootstrap that draws items and, independently, seeds; all numbers of one set of items
share the same draws, so differences are paired, and the several caps and seeds of an item are drawn with it. The same
episodes always give the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from routers.evaluation.episodes import LOST, THEN, Episodes, Kind
from routers.evaluation.frontier import Point, aiq, mixing_score, normalised_auc, pareto_hull, recovery

RESAMPLES = 2000
PER_ITEMS = 1000
"""Costs are shown in USD per this many items."""
LEFT_OUT = "{} (each member left out)"
"""Name of a router that each member in turn was new to, with the mean over them."""
START_OF = "{}: start{}"
"""Name of a policy's start (and its setting), where several policies began from different ones."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """A column of the frame as tables show it: times `factor`, formatted by `spec`, with an interval or without.

    `compared`: differences between routers are shown, too, in percentage points where `spec` is of a percentage.
    `better`: 1 the more, the better; -1 the less; 0 neither.
    """

    column: str
    header: str
    spec: str
    factor: float = 1.0
    interval: bool = False
    compared: bool = True
    better: int = 0

    def show(self, value: float) -> str:
        return format(value * self.factor, self.spec)

    def show_difference(self, value: float) -> str:
        shown = round(100 * value if "%" in self.spec else value * self.factor, 9) + 0.0  # -0 is 0
        return f"{shown:+.1f} pt" if "%" in self.spec else format(shown, "+" + self.spec)


METRICS = (
    Metric("score", "{score}", ".1%", interval=True, better=1),
    Metric("em", "EM", ".1%", better=1),
    Metric("f1", "F1", ".1%", better=1),
    Metric("usd", "$ / 1k {items}", ".4f", PER_ITEMS, better=-1),
    Metric("reward", "reward", ".3f", interval=True, better=1),
    Metric("valid", "valid", ".1%", compared=False),
    Metric("calls", "calls", ".2f"),
    Metric("large_calls", "expensive calls", ".2f", compared=False),
)
"""What every table and report shows of every router that has it. A new metric is a line here."""


@dataclass(frozen=True)
class Reference:
    """Who a policy is compared with, and how it was found."""

    label: str
    router: str
    how: str = ""


class Bootstrap:
    """Draws of `items` items, and of seeds: weights [B, items] and [B, seeds], each row summing to 1."""

    def __init__(self, items: int, seed: int = 0, count: int = RESAMPLES) -> None:
        if items < 1:
            raise ValueError("there are no items to evaluate")
        self.seed, self.count = seed, count
        self.items = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=count) / items

    def seeds(self, number: int) -> np.ndarray:
        drawn = np.random.default_rng([self.seed, number]).multinomial(
            number, np.full(number, 1 / number), size=self.count
        )
        return drawn / number

    def means(self, values: np.ndarray) -> np.ndarray:
        """[B] means of values [seeds, items] in the draws."""
        return np.asarray(((self.items @ values.T) * self.seeds(len(values))).sum(axis=1))

    def estimate(self, values: np.ndarray, over: np.ndarray | None = None) -> Estimate:
        """Mean of values [seeds, items] with its interval; `over` the mean of others on the same items."""
        drawn, mean = self.means(values), float(values.mean())
        if over is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn, mean = drawn / self.means(over), float(np.float64(mean) / over.mean())
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Estimate(mean, float(low), float(high))


class Paired:
    """The episodes of one set of items as arrays [seeds, items]. Items that the pool lost for anybody are left out.

    Args:
        episodes: of one set (`sets` takes them apart).

    Raises:
        ValueError: nothing is left.
    """

    def __init__(self, episodes: Episodes, resamples: int = RESAMPLES) -> None:
        self.header = episodes.header
        whole = episodes.frame
        lost = set(whole.loc[whole["stop"] == LOST, "item"])
        self.lost = len(lost)
        frame = whole[~whole["item"].isin(lost)]
        if frame.empty:
            raise ValueError(f"no item is left to evaluate: the pool lost {len(lost)} of {whole['item'].nunique()}")
        self.frame = frame
        known = frame.drop_duplicates("item").set_index("item").sort_index()
        self.items: list[str] = known.index.tolist()
        self.families, self.difficulty, self.queries = (known[c].tolist() for c in ("family", "difficulty", "query"))
        self.routers: dict[str, Kind] = dict(zip(frame["router"], frame["kind"], strict=True))
        self.curves: dict[str, str] = dict(zip(frame["router"], frame["curve"], strict=True))
        self.draws = Bootstrap(len(self.items), count=resamples)
        self._groups = dict(iter(frame.groupby(["router", "cap"], sort=False)))
        self._drawn: dict[tuple[str, str], np.ndarray] = {}
        self._areas: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.items)

    def of_kind(self, *kinds: Kind) -> list[str]:
        return [name for name, kind in self.routers.items() if kind in kinds]

    @property
    def policies(self) -> list[str]:
        """Trained routers without a cap (`listed`)."""
        return [name for name in self.listed("policy") if self.played(name)]

    def listed(self, *kinds: Kind) -> list[str]:
        """Routers of these kinds, without the settings of those that were played without a setting, too."""
        return [name for name in self.of_kind(*kinds) if self.curves[name] not in self.routers]

    def caps(self, router: str) -> list[float]:
        """Finite caps that a router was played at."""
        return sorted(cap for name, cap in self._groups if name == router and math.isfinite(cap))

    def values(self, router: str, metric: str, cap: float = math.inf) -> np.ndarray:
        """[seeds, items] of a column; NaN throughout where the router has no such metric.

        Raises:
            ValueError: it was not played on every item, or with every seed.
        """
        rows = self._groups.get((router, cap))
        seeds = 0 if rows is None else rows["seed"].nunique()
        if rows is None or len(rows) != seeds * len(self.items):
            raise ValueError(f"{router} (cap {cap:g}) was not played on all {len(self.items)} items with every seed")
        column = rows[metric].to_numpy(dtype=float) if metric in rows else np.full(len(rows), np.nan)
        return column.reshape(seeds, len(self.items))

    def played(self, router: str, cap: float = math.inf) -> bool:
        return (router, cap) in self._groups

    def first(self, router: str) -> pd.DataFrame:
        """Rows of a router's first seed, without a cap, in the order of `items`."""
        return self._groups[router, math.inf].iloc[: len(self.items)]

    def has(self, metric: str, routers: Sequence[str] | None = None) -> bool:
        if metric not in self.frame:
            return False
        rows = self.frame if routers is None else self.frame[self.frame["router"].isin(routers)]
        return bool(rows[metric].notna().any())

    def one_reward(self, router: str, other: str) -> bool:
        """Whether both were paid by one rule: at other price sensitivities rewards do not compare."""
        rules = self.header.get("rule", {})
        told = [rules.get(name, rules.get("baselines")) for name in (router, other)]
        return None in told or told[0] == told[1]

    def estimate(self, router: str, metric: str, cap: float = math.inf) -> Estimate:
        return self.draws.estimate(self.values(router, metric, cap))

    def mean(self, router: str, metric: str) -> float:
        return float(self.values(router, metric).mean())

    def ratio(self, router: str, other: str, metric: str) -> Estimate:
        """Mean of a metric over that of another router, on the same draws."""
        return self.draws.estimate(self.values(router, metric), self.values(other, metric))

    def difference(self, router: str, other: str, metric: str) -> Estimate:
        """Router minus another: paired by item, and by seed where both have as many (else by the other's mean)."""
        a, b = self.values(router, metric), self.values(other, metric)
        return self.draws.estimate(a - (b if len(a) == len(b) else b.mean(axis=0)))

    def by(self, router: str, groups: Sequence[str], metric: str = "score") -> dict[str, float]:
        """Mean per group of items."""
        values, names = self.values(router, metric), np.asarray(groups)
        return {name: float(values[:, names == name].mean()) for name in sorted(set(groups))}

    def asked(self, router: str) -> dict[str, float]:
        """Share of a router's calls (without a cap) that went to each member, in falling order; {}: not known."""
        counts: Counter[str] = Counter()
        for members in self._groups[router, math.inf]["member"]:
            counts.update(members.split(THEN) if members else [])
        return {member: n / counts.total() for member, n in counts.most_common()}

    def shares(self, router: str, column: str) -> dict[str, float]:
        """Share of a router's episodes (without a cap) with each value of a column, in falling order."""
        found = self._groups[router, math.inf][column].value_counts(normalize=True)
        return {str(value): float(part) for value, part in found.items()}

    def entropy(self, router: str) -> float | None:
        """Of `asked`, in nats."""
        shares = np.array(list(self.asked(router).values()))
        return float(-(shares * np.log(shares)).sum()) + 0.0 if len(shares) else None

    def beyond_mixing(self, router: str, points: Sequence[str]) -> Estimate:
        """Score minus what drawing one of `points` per item reaches at the same mean cost (their hull); paired."""
        own, paid = (self.drawn(router, metric) for metric in ("score", "usd"))
        gains = [s - mixing_score(*plane, at) for s, at, plane in zip(own, paid, self._planes(points), strict=True)]
        return _estimate(np.array(gains))

    def drawn(self, router: str, metric: str) -> np.ndarray:
        """[1 + B]: the mean, and the mean of each draw."""
        if (router, metric) not in self._drawn:
            values = self.values(router, metric)
            self._drawn[router, metric] = np.concatenate([[values.mean()], self.draws.means(values)])
        return self._drawn[router, metric]

    def _planes(self, routers: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Costs and scores of routers, as they are and in every draw."""
        usd, score = (np.stack([self.drawn(name, m) for name in routers], axis=1) for m in ("usd", "score"))
        return zip(usd, score, strict=True)

    @cached_property
    def frontiers(self) -> dict[str, list[str]]:
        """What is to be had by drawing lots: between members, or between the settings of each rule (and members)."""
        members, found = self.of_kind("member"), dict[str, list[str]]()
        for name in self.of_kind("rule"):
            if curve := self.curves[name]:
                found.setdefault(curve, list(members)).append(name)
        return found or ({"mixing members": members} if members else {})

    @cached_property
    def ends(self) -> tuple[str, str] | None:
        """The members at the ends of `auc`: the cheapest and the dearest; of a pair of executors small and large, in
        their order, for in steps the small one may cost more."""
        members = self.of_kind("member")
        if len(members) != 2 or self.header.get("task") != "step_routing":
            members.sort(key=lambda name: self.mean(name, "usd"))
        return (members[0], members[-1]) if len(members) > 1 else None

    @cached_property
    def curves_of(self) -> dict[str, list[str]]:
        """Name -> settings of a router (with itself), or itself alone; of rules, with the members (`frontiers`)."""
        found: dict[str, list[str]] = {}
        for name, kind in self.routers.items():
            if self.played(name) and kind != "member" and not (kind == "rule" and self.curves[name]):
                found.setdefault(self.curves[name] or name, []).append(name)
        members = self.of_kind("member")
        return {**found, **{"mixing members": members, **self.frontiers}} if members else found

    def aiq(self, name: str, other: str = "") -> Estimate:
        """AIQ of a curve of `curves_of` between the cheapest and the dearest member; minus another's; paired."""
        return _estimate(self._aiq(name) - (self._aiq(other) if other else 0.0))

    def _aiq(self, name: str) -> np.ndarray:
        if name not in self._areas:
            planes = zip(self._planes(self.of_kind("member")), self._planes(self.curves_of[name]), strict=True)
            self._areas[name] = np.array([aiq(*own, all_usd.min(), all_usd.max()) for (all_usd, _), own in planes])
        return self._areas[name]

    def recovery(self, name: str) -> list[Point]:
        """`frontier.recovery` of a curve, from the cheapest to the best-scoring member."""
        members = [(self.mean(m, "usd"), self.mean(m, "score")) for m in self.of_kind("member")]
        if not members:
            return []
        weak, strong = min(members), max(members, key=lambda point: (point[1], -point[0]))
        usd, score = (np.array([self.mean(n, m) for n in self.curves_of[name]]) for m in ("usd", "score"))
        if self.routers[self.curves_of[name][0]] == "member":  # who draws lots leaves out dominated members
            hull = pareto_hull(usd, score)
            usd, score = usd[hull], score[hull]
        return recovery(usd, score, weak, strong)

    def regret(self, name: str, metric: str) -> Estimate | None:
        """What the best for each item has, minus a router's mean; None: no oracle was played."""
        return self.draws.estimate(self._best_of_each(metric) - self.values(name, metric)) if self.has_oracle else None

    @property
    def has_oracle(self) -> bool:
        return bool(self.of_kind("oracle"))

    def _best_of_each(self, metric: str) -> np.ndarray:
        """[items]: of oracles and members. Who is most right, at whatever price, is not always who earns most."""
        names = [name for name in self.of_kind("oracle", "member") if self.played(name)]
        return np.max([self.values(name, metric).mean(axis=0) for name in names], axis=0)

    def gained(self, router: str, of: str = "") -> Estimate:
        """Share of the way from the best single member's reward to that of the best for each item; over another
        router's share."""
        single, each = (
            self.drawn(self._best("", self.of_kind("member")).router, "reward"),
            self._best_of_each("reward"),
        )
        most = np.concatenate([[each.mean()], self.draws.means(each[None])])
        own = self.drawn(router, "reward") - single
        whole = self.drawn(of, "reward") - single if of else most - single
        return _estimate(np.divide(own, whole, out=np.full_like(own, math.nan), where=whole > 0))

    def auc(self, routers: Sequence[str]) -> float:
        """`normalised_auc` of these routers at all their caps, and of its two `ends`; NaN: there are none."""
        if self.ends is None:
            return math.nan
        played = [key for key in self._groups if key[0] in {*self.ends, *routers}]
        points = [tuple(float(self.values(name, m, cap).mean()) for m in ("usd", "score")) for name, cap in played]
        return normalised_auc(points, *(self.mean(name, "usd") for name in self.ends))

    @cached_property
    def references(self) -> list[Reference]:
        """Who every policy is compared with, besides its start; the strongest baseline of all is the last."""
        everybody: tuple[Kind, ...] = ("member", "learned", "told", "rule", "random")
        wanted: dict[str, tuple[Kind, ...]] = {
            "the best single member": ("member",),
            "the best learned baseline": ("learned",),
            "the strongest baseline of all": everybody,
        }
        best = [self._best(label, names) for label, kinds in wanted.items() if (names := self.listed(*kinds))]
        found: dict[str, Reference] = {}
        for one in best:  # who is several of them is compared with once
            known = found.pop(one.router, None)
            label = f"{known.label} = {one.label}" if known else one.label
            found[one.router] = Reference(label, one.router, one.how)
        return list(found.values())

    @cached_property
    def rules(self) -> list[Reference]:
        """The best setting of every family of rules."""
        families: dict[str, list[str]] = {}
        for name in self.of_kind("rule"):
            if curve := self.curves[name]:
                families.setdefault(curve, []).append(name)
        return [self._best(family, names) for family, names in families.items()]

    def start_of(self, policy: str) -> Reference | None:
        """What the training of a policy began from, with the same setting where there is one."""
        starts, (base, comma, how) = self.of_kind("start"), policy.partition(", ")
        wanted = (START_OF.format(base, comma + how), f"start{comma}{how}", START_OF.format(base, ""))
        own = [name for name in wanted if name in starts] or starts[:1]
        return Reference("the start", own[0]) if own else None

    def _best(self, label: str, names: Sequence[str]) -> Reference:
        trained: Mapping[str, float] = self.header.get("train_reward", {})
        if all(name in trained for name in names):
            how = f"chosen on {self.header.get('chosen_on', 'training data')}"
            return Reference(label, max(names, key=lambda name: trained[name]), how)
        best = max(names, key=lambda name: self.mean(name, "reward"))
        return Reference(label, best, "chosen on these very items, which favours it")


def sets(episodes: Episodes) -> dict[str, Paired]:
    """The sets of items in the episodes, by name; made once: text, page and picture of a report share the draws."""
    kept = vars(episodes)
    if "_sets" not in kept:
        kept["_sets"] = {str(name): Paired(episodes.of(set=name)) for name in episodes.frame["set"].unique()}
    found: dict[str, Paired] = kept["_sets"]
    return found


def _estimate(drawn: np.ndarray) -> Estimate:
    """Of a number as it is and in every draw, ``[1 + B]``; draws in which it is not defined are left out."""
    defined = drawn[1:][np.isfinite(drawn[1:])]
    if not np.isfinite(drawn[0]) or not len(defined):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(float(drawn[0]), float(low), float(high))
