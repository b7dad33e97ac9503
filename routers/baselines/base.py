"""What fitted baselines share: the data they read, how settings are chosen, and what they do as `routers.Router`s.

A baseline is a subclass of `Fitted` with `learn` and `foretell`, in a file of its own, and a line in
`routers.baselines.BASELINES`. All are tuned alike: of `grid` the settings that earn most on a fifth of the training
queries, learned from the other four; then everything is learned anew from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self
from zlib import crc32

import numpy as np
from scipy.special import softmax

from routers.baselines.features import Features
from routers.data.catalogue import Member
from routers.data.folds import folds
from routers.data.table import ReplyTable
from routers.data.typical import TypicalCalls, price_change, seen_in
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.router import Decision, Router, RouterFile, check_queries, members_now, plain_settings, write_router
from srpo.ranges import Ranges, above, at_least, check_numbers

KIND = "fitted"
STATE_FILE = "fitted.skops"
Query = str | Mapping[str, Any]
"""A text, or a mapping with `query`, and `family` where it is known."""

TRUSTED = [
    "routers.baselines.families.FamilyGuessed",
    "routers.baselines.mlp.MLP",
    "routers.baselines.neighbours.Neighbours",
    "routers.baselines.ridge.Ridge",
    "scipy.sparse._csr.csr_matrix",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
]
"""What a file may hold beside arrays, numbers and the estimators that skops knows."""


@dataclass(frozen=True)
class FittedSettings(TypicalCalls):
    """What `router.yaml` says of a fitted baseline.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {"cost_scale": above(0), "cost_weight": at_least(0)}

    baseline: str
    """A key of `routers.baselines.BASELINES`."""
    members: tuple[Member, ...]
    cost_scale: float
    """USD at which the penalty reaches the cost weight."""
    cost_weight: float
    """Where `route` is given none."""
    typical: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean tokens of a member's prompt and reply in the table that it was fitted on; empty: outcomes say none."""
    typical_usd: Mapping[str, float] = field(default_factory=dict)
    """Mean USD of a member's reply there."""

    def __post_init__(self) -> None:
        check_numbers(self)


class Data:
    """Queries, and of training queries their outcomes.

    Args:
        queries: texts or mappings (`Query`).
        features: fitted on the training texts.
        score, usd: ``[Q, M]``, usd in units of the cost scale; empty where nothing is known.
        rule: of the reward. None: `score` is the reward itself, scaled to [0, 1], and price is in it.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        features: Features,
        score: np.ndarray | None = None,
        usd: np.ndarray | None = None,
        members: Sequence[str] = (),
        rule: RewardRule | None = None,
    ) -> None:
        self.queries, self.features, self.members, self.rule = queries, features, list(members), rule
        empty = np.zeros((len(queries), len(members)))
        self.score, self.usd = (empty if values is None else values for values in (score, usd))
        self._views: dict[str, Any] = {}
        self._whole: tuple[Data, np.ndarray] | None = None

    @classmethod
    def of(cls, known: Outcomes) -> Data:
        """Training data. Without a rule nothing says what a dollar costs: the reward itself is learned then."""
        items = list(known.items)
        features = Features().fit([text_of(item) for item in items])
        if known.rule is None:
            low, high = known.reward.min(), known.reward.max()
            scaled = (known.reward - low) / (high - low if high > low else 1.0)
            return cls(items, features, scaled, np.zeros_like(known.usd), known.members)
        return cls(items, features, known.score, known.usd / known.rule.cost_scale, known.members, known.rule)

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def cost_weight(self) -> float:
        return self.rule.cost_weight if self.rule else 0.0

    @cached_property
    def families(self) -> np.ndarray:
        return np.array(["" if isinstance(query, str) else str(query.get("family", "")) for query in self.queries])

    def reward(self, cost_weight: float) -> np.ndarray:
        return np.asarray(self.score - cost_weight * np.minimum(self.usd, 1))

    def view(self, name: str) -> Any:
        """``[Q, F]``, made once; see `Features.view`."""
        if name not in self._views:
            if self._whole is not None:
                whole, rows = self._whole
                self._views[name] = whole.view(name)[rows]
            else:
                tfidf = self.view("tfidf") if name == "svd" else None
                self._views[name] = self.features.view(name, [text_of(query) for query in self.queries], tfidf)
        return self._views[name]

    def rows(self, rows: np.ndarray) -> Data:
        part = Data(
            [self.queries[i] for i in rows], self.features, self.score[rows], self.usd[rows], self.members, self.rule
        )
        part._whole = (self, rows)
        return part

    @cached_property
    def folds(self) -> list[tuple[np.ndarray, Data, Data]]:
        """Places of a fold, the other folds, and the fold; the first is the fifth on which settings are chosen."""
        parts, every = folds([text_of(query) for query in self.queries]), np.arange(len(self))
        return [(part, self.rows(np.setdiff1d(every, part)), self.rows(part)) for part in parts if len(parts) > 1]

    @cached_property
    def usd_model(self) -> tuple[np.ndarray, np.ndarray]:
        """Middle and weights of a ridge regression of `usd`: for baselines that only foretell who is right."""
        from routers.baselines.ridge import solve

        return self.usd.mean(axis=0), solve(self.view("tfidf"), self.usd - self.usd.mean(axis=0), 0.3)


@dataclass(frozen=True)
class Told:
    """What a baseline says of queries: expected correctness and USD (in cost scales), both ``[Q, M]``.

    `score` is None for one that only says whom to ask; its `logits`, ``[Q, M]`` at a cost weight, stand for the
    expected reward then. `draws`: it asks at random, with these log-probabilities.
    """

    score: np.ndarray | None
    usd: np.ndarray
    logits: Callable[[float], np.ndarray] | None = None
    draws: bool = False

    @classmethod
    def of(cls, both: np.ndarray) -> Told:
        """Of score and usd side by side, ``[Q, 2 M]``."""
        score, usd = np.hsplit(both, 2)
        return cls(score, usd)

    def values(self, cost_weight: float) -> np.ndarray:
        """What a route is chosen by, ``[Q, M]``."""
        if self.logits is not None:
            return self.logits(cost_weight)
        assert self.score is not None
        return np.asarray(self.score - cost_weight * np.minimum(self.usd, 1))

    def chances(self, cost_weight: float, columns: Sequence[int] | None = None) -> np.ndarray:
        """Probability that each member (of these columns) is asked; without `draws`, 1 for the first of the best."""
        values = self.values(cost_weight)
        values = values if columns is None else values[:, columns]
        if not self.draws:
            return np.eye(values.shape[1])[values.argmax(axis=1)]
        return np.asarray(softmax(values, axis=1))


class Fitted(Router):
    """A baseline that is fitted on outcomes. Subclasses say how: `learn`, and `foretell_score` or `foretell`.

    Their attributes hold arrays, numbers, texts and scikit-learn's estimators only: `save` writes them by skops.

    Attributes:
        settings: what `router.yaml` says; its members are the columns of all that is foretold.
        members: those that may be asked.
    """

    kind = KIND
    grid: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Settings to choose from; of equals the first."""
    seed = 0
    settings: FittedSettings
    members: tuple[Member, ...]
    features: Features

    def learn(self, *data: Any, **settings: Any) -> None:
        """`learn(data, ...)`: from all of `data`, with one of the settings of `grid`, forgetting what was before."""
        raise NotImplementedError

    def foretell_score(self, data: Data) -> np.ndarray:
        """Expected correctness ``[Q, M]``."""
        raise NotImplementedError

    def foretell(self, data: Data) -> Told:
        """What is expected of queries. Without an own way to foretell USD: by `Data.usd_model`."""
        return Told(self.foretell_score(data), self.foretell_usd(data))

    def foretell_usd(self, data: Data) -> np.ndarray:
        middle, weights = self.usd_model
        return np.maximum(middle + data.view("tfidf") @ weights, 0)

    def learn_with(self, data: Data, settings: Mapping[str, Any]) -> Self:
        if type(self).foretell is Fitted.foretell:
            self.usd_model = data.usd_model
        self.learn(data, **settings)
        return self

    def tuned(self, data: Data) -> Mapping[str, Any]:
        """The settings of `grid` that earn most on the first fold, learned from the others."""
        if len(self.grid) == 1 or not data.folds:
            return self.grid[0]
        _, known, held_out = data.folds[0]
        reward = held_out.reward(data.cost_weight)

        def earned(settings: Mapping[str, Any]) -> float:
            told = self.learn_with(known, settings).foretell(held_out)
            return float((told.chances(data.cost_weight) * reward).sum())

        return max(self.grid, key=earned)

    def fit(  # type: ignore[override]  # takes no other options
        self,
        table: ReplyTable | Outcomes | Data,
        split: str = "train",
        *,
        seed: int = 0,
        cost_weight: float = 0.2,
        settings: Mapping[str, Any] | None = None,
    ) -> Self:
        """Learn from recorded replies or outcomes.

        Args:
            table: replies, of which the `split` is learned from; or outcomes.
            seed: of estimators that draw lots.
            cost_weight: by which settings are chosen and `route` decides; outcomes have their own.
            settings: of `grid`; None: chosen (`tuned`).

        Raises:
            ValueError: there is nothing to learn from.
        """
        members: tuple[Member, ...] = ()
        typical: dict[str, Any] = {}
        if isinstance(table, ReplyTable):
            members, typical = tuple(table.catalogue.values()), seen_in(table)
            table = Outcomes.of_table(table, RewardRule(table.max_cost, cost_weight), split)
        data = Data.of(table) if isinstance(table, Outcomes) else table
        if not len(data):
            raise ValueError(f"there are no queries in the split {split!r} to fit a router on")
        self.seed, self.features = seed, data.features
        self.members = members or tuple(Member(name, descriptor=name) for name in data.members)
        scale = data.rule.cost_scale if data.rule else 1.0
        self.settings = FittedSettings(_name_of(type(self)), self.members, scale, data.cost_weight, **typical)
        return self.learn_with(data, self.tuned(data) if settings is None else settings)

    def foretold(self, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
        """Expected correctness and USD, both ``[Q, M]``, of the members that it was fitted on, at their prices then.

        Fitted on outcomes without a rule, the first is the expected reward scaled to [0, 1], and USD are 0.

        Raises:
            CannotDo: it only says whom to ask.
        """
        told = self.foretell(Data(queries, self.features))
        if told.score is None:
            raise self._cannot("foretell how members do: it only says whom to ask")
        return told.score, told.usd * self.settings.cost_scale

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """See `Router.route`. `context`: the query's family, for baselines that are told it.

        Raises:
            CannotDo: a context that is no text.
            ValueError: as `route_all`.
        """
        if context is not None and not isinstance(context, str):
            raise self._cannot("read a context other than the query's family")
        item: Query = query if context is None else {"query": query, "family": context}
        return self.route_all([item], cost_weight=cost_weight, members=members)[0]

    def route_all(
        self, queries: Sequence[Query], *, cost_weight: float | None = None, members: Sequence[str] | None = None
    ) -> list[Decision]:
        """`route` for several. One that asks at random draws by the query's text: the same query, the same member.

        Raises:
            ValueError: an empty query, an unknown member, or a cost weight that is negative or no number.
        """
        texts = [text_of(query) for query in queries]
        check_queries(texts)
        weight = self.settings.cost_weight if cost_weight is None else cost_weight
        if not 0 <= weight < np.inf:
            raise ValueError(f"cost_weight is {weight}; it must be a finite number >= 0")
        fitted = [member.name for member in self.settings.members]
        pool = [member.name for member in members_now(self.members, members)]
        columns = [fitted.index(name) for name in pool]
        told = self._repriced(self.foretell(Data(queries, self.features)))
        usd = told.usd[:, columns] * self.settings.cost_scale
        decisions = []
        for text, chances, costs in zip(texts, told.chances(weight, columns), usd, strict=True):
            lot = np.random.default_rng([self.seed, crc32(text.encode())]).random() if told.draws else 0.5
            chosen = min(int(np.searchsorted(chances.cumsum(), lot)), len(pool) - 1)
            scores = dict(zip(pool, map(float, chances), strict=True)) if told.draws else {}
            decisions.append(Decision((pool[chosen],), scores, usd=float(costs[chosen])))
        return decisions

    def _repriced(self, told: Told) -> Told:
        """The same at the members' prices now. One that only says whom to ask goes on asking as it learned to."""
        now = {member.name: member for member in self.members}
        changes = [self._change(then, now.get(then.name, then)) for then in self.settings.members]
        factor, added = np.array(changes).T
        return replace(told, usd=told.usd * factor + added / self.settings.cost_scale)

    def _change(self, then: Member, now: Member) -> tuple[float, float]:
        name = then.name
        change = price_change(then, now, self.settings.typical.get(name), self.settings.typical_usd.get(name))
        if change is None:
            raise ValueError(
                f"{name} has other prices than the router was fitted with, and it does not know how long its calls "
                "are: fit it again, on a table that counts tokens, or leave its prices as they were"
            )
        return change

    def save(self, folder: str | Path) -> None:
        """`router.yaml` and what was learned."""
        import skops.io

        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value for name, value in vars(self).items() if name not in ("settings", "members", "features")}
        skops.io.dump({"router": state, "features": vars(self.features)}, Path(folder, STATE_FILE))
        write_router(folder, KIND, plain_settings(self.settings))

    @classmethod
    def load(
        cls,
        name: str,
        file: RouterFile,
        *,
        members: Sequence[str] | None = None,
        catalogue: str | Path | Mapping[str, Member] | None = None,
    ) -> Fitted:
        """See `routers.load_router`. A member that it was not fitted on cannot be routed to; what one costs that was
        re-priced is foretold at its new prices.

        Raises:
            ValueError: such a member, one whose cost at its new prices nothing tells, an unknown baseline, or a file
                with types that none of our baselines holds.
            OSError: there is no state beside `router.yaml`.
        """
        from routers.baselines import BASELINES

        settings = file.settings_of(FittedSettings, KIND)
        make = BASELINES[settings.baseline].how if settings.baseline in BASELINES else None
        if not (isinstance(make, type) and issubclass(make, Fitted)):
            raise ValueError(f"{file.path}: no fitted baseline is called {settings.baseline!r}")
        state = read_state(name, STATE_FILE)
        self = make()
        vars(self).update(state["router"])
        self.features = Features()
        vars(self.features).update(state["features"])
        self.settings, self.members = settings, members_now(settings.members, members, catalogue)
        fitted = {member.name for member in settings.members}
        if new := [member.name for member in self.members if member.name not in fitted]:
            raise ValueError(f"{new[0]} is a member that this router was not fitted on; leave it out (members=...)")
        for then in settings.members:
            self._change(then, next((now for now in self.members if now.name == then.name), then))
        return self


def read_state(name: str, file: str) -> Any:
    """What `save` wrote into a folder or Hub repository.

    Raises:
        ValueError: a type that no router of ours needs.
        FileNotFoundError: there is no such file.
    """
    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    path = Path(name, file)
    if not Path(name).is_dir():
        from srpo.rollout.shared import find_file

        path = find_file(name, file) or path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `save` writes it beside router.yaml")
    try:
        return skops.io.load(path, trusted=TRUSTED)
    except UntrustedTypesFoundException as error:
        raise ValueError(f"{path}: holds what no baseline of ours needs, so it is not read: {error}") from None


def text_of(query: Query) -> str:
    return query if isinstance(query, str) else str(query.get("query", ""))


def _name_of(kind: type[Fitted]) -> str:
    from routers.baselines import BASELINES

    return next((name for name, one in BASELINES.items() if one.how is kind), kind.__name__)
