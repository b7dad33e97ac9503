"""Routers that learn from the outcomes of their own choices only: bandits, behind one router.

A bandit is a `Learner` with a line in `learners()`. What it sees of a query is a vector: the leading directions of its
TF-IDF, or of that and MiniLM's embedding, of length 1, and a constant; they are fitted on texts, never on outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from routers.baselines.features import Features, unit_rows
from routers.data.catalogue import Member
from routers.evaluation.episodes import RewardRule
from routers.router import Decision, Router, RouterFile, check_queries, members_now, plain_settings, write_router

KIND = "online"
STATE_FILE = "online.skops"
MOST_CONTEXTS = 20_000
"""Queries whose features are remembered."""


class Learner:
    """One rule of choosing members and of learning from what came of it.

    Attributes hold arrays, numbers and texts, which `OnlineRouter.save` writes. Settings are class attributes, and
    keyword arguments of the constructor; `grid` says which are tried when they are chosen.
    """

    grid: ClassVar[Sequence[Mapping[str, float]]] = ({},)
    directions = 64
    """Of the query that are read, the leading ones; there are no more than `features.DIRECTIONS`."""
    minilm = 0
    """1: they are of TF-IDF and of MiniLM's embedding; 0: of TF-IDF."""
    epsilon: float | None = 0.0
    """Share of the choices that are made uniformly at random; None: no setting of a rule that draws lots itself."""

    def __init__(self, **settings: float) -> None:
        if unknown := [name for name in settings if not isinstance(getattr(type(self), name, None), (int, float))]:
            raise ValueError(f"{type(self).__name__} has no setting {unknown[0]!r}")
        vars(self).update(settings)

    def reads(self, contexts: np.ndarray) -> np.ndarray:
        """``[Q, d]``: what this learner reads of contexts ``[Q, D]``: `directions` of them, and the constant."""
        return np.hstack([contexts[:, :-1][:, : int(self.directions)], contexts[:, -1:]])

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        """Forget everything. `contexts`: ``[Q, d]`` of queries without outcomes, to know what queries look like."""
        raise NotImplementedError

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """``[M]``: who has the highest is asked. `x`: ``[d]``; without `rng` nothing is explored."""
        raise NotImplementedError

    def chances(self, x: np.ndarray, rng: np.random.Generator | None, columns: Sequence[int]) -> np.ndarray:
        """Probability that each of these members is asked (of rules that draw lots inside `values`: given the lot)."""
        epsilon = 0.0 if rng is None else self.epsilon or 0.0
        best = np.eye(len(columns))[self.values(x, rng)[columns].argmax()]
        return (1 - epsilon) * best + epsilon / len(columns)

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        """What became of a choice: `usd` in cost scales, at most 1; `chance`: with what probability it was made."""
        raise NotImplementedError


class LinUCB(Learner):
    """Disjoint LinUCB (Li et al. 2010) with GreenServ's constants among the grid: theta'x + alpha sqrt(x'A^-1 x)."""

    grid = tuple(
        {"alpha": a, "ridge": r, "directions": d} for a in (0.1, 0.3, 0.5) for r in (0.3, 1.0, 3.0) for d in (16, 64)
    )
    alpha, ridge = 0.3, 1.0

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        self.shape(members, contexts.shape[1])

    def shape(self, arms: int, width: int) -> None:
        self.inverse = np.tile(np.eye(width) / self.ridge, (arms, 1, 1))
        self.moment, self.theta = np.zeros((arms, width)), np.zeros((arms, width))

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        mean = self.theta @ x
        return mean if rng is None else mean + self.alpha * np.sqrt(np.maximum(self.inverse @ x @ x, 0))

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        self.regress(x, chosen, reward)

    def regress(self, x: np.ndarray, arm: int, reward: float) -> None:
        """A += x x', b += r x, by Sherman and Morrison."""
        along = self.inverse[arm] @ x
        self.inverse[arm] -= np.outer(along, along) / (1 + x @ along)
        self.moment[arm] += reward * x
        self.theta[arm] = self.inverse[arm] @ self.moment[arm]


class SharedLinUCB(LinUCB):
    """Symphony-Coord's global form: one theta for all members. Its features of a pair (query, member) are INFERRED:
    the query, and the query again in the member's own place."""

    grid = tuple(
        {"alpha": a, "ridge": r, "directions": d} for a in (0.1, 0.3, 0.5) for r in (0.3, 1.0, 3.0) for d in (16, 32)
    )
    directions = 16

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        self.members = members
        self.shape(1, (members + 1) * contexts.shape[1])

    def pairs(self, x: np.ndarray) -> np.ndarray:
        return np.hstack([np.tile(x, (self.members, 1)), np.kron(np.eye(self.members), x)])

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        pairs = self.pairs(x)
        width = np.sqrt(np.maximum(((pairs @ self.inverse[0]) * pairs).sum(axis=1), 0))
        return np.asarray(pairs @ self.theta[0] + (0 if rng is None else self.alpha * width))

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        self.regress(self.pairs(x)[chosen], 0, reward)


class LinearThompson(LinUCB):
    """Thompson sampling on the same regressions (Agrawal and Goyal 2013): x'theta, theta ~ N(theta, alpha^2 A^-1)."""

    grid = tuple(
        {"alpha": a, "ridge": r, "directions": d} for a in (0.03, 0.1, 0.3) for r in (0.3, 1.0, 3.0) for d in (16, 64)
    )
    alpha = 0.1

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        mean = self.theta @ x
        if rng is None:
            return mean
        return mean + self.alpha * np.sqrt(np.maximum(self.inverse @ x @ x, 0)) * rng.standard_normal(len(mean))


class EpsilonGreedy(LinUCB):
    grid = tuple({"epsilon": e, "ridge": r} for e in (0.02, 0.05, 0.1) for r in (0.05, 0.3, 1.0))
    alpha, epsilon = 0.0, 0.1


class ByCategory(Learner):
    """Rules without a model of the query: they count per category, here the nearest of some centres (k-means)."""

    categories = 8

    def start(self, contexts: np.ndarray, members: int, seed: int) -> None:
        from sklearn.cluster import KMeans

        number = min(int(self.categories), len(np.unique(contexts, axis=0)))
        self.centres = KMeans(number, n_init=4, random_state=seed).fit(contexts).cluster_centers_
        self.counters(number, members)

    def counters(self, categories: int, members: int) -> None:
        raise NotImplementedError

    def category(self, x: np.ndarray) -> int:
        return int(((self.centres - x) ** 2).sum(axis=1).argmin())


class BetaThompson(ByCategory):
    """vLLM Semantic Router's (`rl_driven.go`): draws from Beta(wins + 1, losses + 1), the parameters of all queries
    and of the category blended by `blend`, times 1 + 0.2 (1 - normalised cost). A graded score is a part of a win."""

    grid = tuple({"categories": c, "blend": b} for c in (1, 8, 32) for b in (0.5, 0.8, 1.0))
    blend, cost_bonus = 0.5, 0.2

    def counters(self, categories: int, members: int) -> None:
        self.beta = np.ones((categories + 1, members, 2))
        """Of every category, and of all queries: (wins, losses)."""
        self.usd = np.zeros((members, 2))
        """Sum of cost scales, and calls."""

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        both = (1 - self.blend) * self.beta[-1] + self.blend * self.beta[self.category(x)]
        drawn = both[:, 0] / both.sum(axis=1) if rng is None else rng.beta(both[:, 0], both[:, 1])
        usd = self.usd[:, 0] / np.maximum(self.usd[:, 1], 1)
        return np.asarray(drawn * (1 + self.cost_bonus * (1 - usd)))

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        self.beta[[self.category(x), -1], chosen] += (score, 1 - score)
        self.usd[chosen] += (usd, 1)


class EMA(ByCategory):
    """ORCH's router: s <- (1 - rate) s + rate r per category and member (INFERRED form), epsilon-greedy."""

    grid = tuple({"categories": c, "rate": r} for c in (1, 8, 32) for r in (0.02, 0.05, 0.2))
    rate, epsilon = 0.05, 0.1

    def counters(self, categories: int, members: int) -> None:
        self.average = np.zeros((categories, members))

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return np.asarray(self.average[self.category(x)])

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        category = self.category(x)
        self.average[category, chosen] += self.rate * (reward - self.average[category, chosen])


class Pheromone(ByCategory):
    """AMRO-S: pheromone per task type, mixed by how near the query is to each, laid where the answer was right;
    p ~ tau^power. INFERRED: standard ant colony optimisation; f_sys is 1 + the cost weight's unit of cost."""

    grid = tuple({"categories": c, "rate": r, "power": p} for c in (1, 8, 32) for r in (0.05, 0.02) for p in (2, 4))
    rate, power, sharpness, floor, epsilon = 0.02, 2.0, 10.0, 0.02, None

    def counters(self, categories: int, members: int) -> None:
        self.trail = np.full((categories, members), 0.5)

    def near(self, x: np.ndarray) -> np.ndarray:
        weights = np.exp(-self.sharpness * ((self.centres - x) ** 2).sum(axis=1))
        return np.asarray(weights / weights.sum())

    def values(self, x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return np.asarray(np.maximum(self.near(x) @ self.trail, self.floor) ** self.power)

    def chances(self, x: np.ndarray, rng: np.random.Generator | None, columns: Sequence[int]) -> np.ndarray:
        values = self.values(x, rng)[columns]
        return values / values.sum() if rng is not None else np.eye(len(columns))[values.argmax()]

    def learn(self, x: np.ndarray, chosen: int, reward: float, score: float, usd: float, chance: float) -> None:
        weight = self.rate * self.near(x)
        self.trail[:, chosen] += weight * (score / (1 + usd) - self.trail[:, chosen])


def learners() -> dict[str, type[Learner]]:
    """By the names that tables show."""
    from routers.baselines.optimist import Optimist

    return {
        "LinUCB": LinUCB,
        "LinUCB, shared": SharedLinUCB,
        "Thompson, linear": LinearThompson,
        "Thompson, Beta": BetaThompson,
        "epsilon-greedy": EpsilonGreedy,
        "EMA": EMA,
        "pheromone": Pheromone,
        "logistic, optimistic": Optimist,
    }


@dataclass(frozen=True)
class OnlineSettings:
    """What `router.yaml` says of an online router."""

    learner: str
    """A key of `learners()`."""
    members: tuple[Member, ...]
    rule: RewardRule
    how: Mapping[str, float]
    """Settings of the learner."""
    seed: int = 0


class OnlineRouter(Router):
    """A learner as a router: `route`, then `update` with the outcome.

    Args:
        settings: what it is.
        queries: texts, without outcomes, that the features are fitted on.
        like: another router on the same queries, whose features are used as they are.

    Attributes:
        explores: False: `route` asks whom it takes for the best, and draws no lots.

    Raises:
        ValueError: an unknown learner or setting.
    """

    kind = KIND
    features: Features
    _contexts: dict[tuple[str, str], np.ndarray]

    def __init__(self, settings: OnlineSettings, queries: Sequence[str], like: OnlineRouter | None = None) -> None:
        self._make(settings)
        self.features = like.features if like else Features().fit(queries)
        self._contexts = like._contexts if like else {}
        self.learner.start(self.learner.reads(self.contexts(queries)), len(settings.members), settings.seed)

    def _make(self, settings: OnlineSettings) -> None:
        if settings.learner not in learners():
            raise ValueError(f"there is no online learner {settings.learner!r}; there are {', '.join(learners())}")
        self.settings, self.name = settings, settings.learner
        self.members = settings.members
        self.learner = learners()[settings.learner](**settings.how)
        self.explores, self.decisions = True, 0
        self._contexts = {}

    def contexts(self, queries: Sequence[str]) -> np.ndarray:
        """``[Q, d]``: rows of length 1, and a constant."""
        view = "both" if self.learner.minilm else "svd"
        new = list(dict.fromkeys(query for query in queries if (view, query) not in self._contexts))
        if new and len(self._contexts) > MOST_CONTEXTS:  # behind a server there is no end of them
            self._contexts.clear()
            new = list(dict.fromkeys(queries))
        if new:
            rows = unit_rows(self.features.view(view, new))
            self._contexts.update(zip([(view, query) for query in new], rows, strict=True))
        return np.array([self._contexts[view, query] for query in queries])

    def _read(self, query: str) -> np.ndarray:
        return self.learner.reads(self.contexts([query]))[0]

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """See `Router.route`. `scores` are the probabilities that the member was drawn by.

        Raises:
            CannotDo: a context, or a cost weight other than that of the rewards that it learned from.
            ValueError: an empty query or an unknown member.
        """
        if context is not None:
            raise self._cannot("read a context beside the query")
        if cost_weight not in (None, self.settings.rule.cost_weight):
            raise self._cannot(f"route at another cost weight than {self.settings.rule.cost_weight:g}, its rewards'")
        check_queries([query])
        pool = [member.name for member in self.settings.members]
        open_to = {member.name for member in members_now(self.members, members)}
        columns = [i for i, name in enumerate(pool) if name in open_to]
        rng = np.random.default_rng([self.settings.seed, self.decisions]) if self.explores else None
        self.decisions += 1
        chances = self.learner.chances(self._read(query), rng, columns)
        drawn = int(chances.argmax() if rng is None else rng.choice(len(columns), p=chances))
        scores = dict.fromkeys(pool, 0.0) | {pool[i]: float(p) for i, p in zip(columns, chances, strict=True)}
        return Decision((pool[columns[drawn]],), scores)

    def update(self, query: str, decision: Decision, outcome: Mapping[str, float]) -> None:
        """Learn what became of a decision of `route`.

        Args:
            outcome: `score` (0 to 1) and `usd` of the member that was asked.

        Raises:
            ValueError: no member was asked, or a value is missing or not finite.
        """
        if decision.member is None:
            raise ValueError("nobody was asked, so there is nothing to learn")
        values = {name: float(outcome.get(name, np.nan)) for name in ("score", "usd")}
        if bad := [name for name, value in values.items() if not np.isfinite(value)]:
            raise ValueError(f"{bad[0]} of the outcome is {outcome.get(bad[0])!r}; it must be a finite number")
        rule = self.settings.rule
        reward = float(rule(np.array(values["score"]), np.array(values["usd"])))
        chosen = [member.name for member in self.settings.members].index(decision.member)
        usd = min(values["usd"] / rule.cost_scale, 1.0)
        x = self._read(query)
        self.learner.learn(x, chosen, reward, values["score"], usd, decision.scores[decision.member])

    def save(self, folder: str | Path) -> None:
        """`router.yaml` and what was learned, so that it goes on learning where it stood."""
        import skops.io

        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"learner": vars(self.learner), "features": vars(self.features), "decisions": self.decisions}
        skops.io.dump(state, Path(folder, STATE_FILE))
        write_router(folder, KIND, plain_settings(self.settings))

    @classmethod
    def load(
        cls,
        name: str,
        file: RouterFile,
        *,
        members: Sequence[str] | None = None,
        catalogue: str | Path | Mapping[str, Member] | None = None,
    ) -> OnlineRouter:
        """See `routers.load_router`. It explores no more; set `explores` to go on learning."""
        from routers.baselines.base import read_state

        self = cls.__new__(cls)
        self._make(file.settings_of(OnlineSettings, KIND))
        state = read_state(name, STATE_FILE)
        vars(self.learner).update(state["learner"])
        self.features, self.decisions, self.explores = Features(), state["decisions"], False
        vars(self.features).update(state["features"])
        self.members = members_now(self.settings.members, members, catalogue)
        known = {member.name for member in self.settings.members}
        if new := [member.name for member in self.members if member.name not in known]:
            raise ValueError(f"{new[0]} is a member that this router does not know; leave it out (members=...)")
        return self
