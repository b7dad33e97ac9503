"""Played episodes of one or several routers on the same items: what every evaluation of every task is.

One frame with a row per (router, set, seed, cap, item) and a header that says what was played. Statistics, tables,
pictures and the report read nothing else, so runs of any task are compared alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from routers.data.table import ReplyTable
from srpo.ranges import Ranges, above, at_least, check_numbers

if TYPE_CHECKING:  # pandas and pyarrow are slow to import, and help shows the keys of every task
    import pandas as pd

EPISODES = "evaluation.parquet"
"""Name of the file in an output folder."""
Kind = Literal["policy", "start", "learned", "told", "rule", "member", "random", "oracle"]
"""What a router is: trained; what its training began from; fitted on the training split; fitted on it and told the
family; a fixed rule; one member for everything; a coin; the best that anybody could do with hindsight."""
KINDS: tuple[Kind, ...] = get_args(Kind)
LOST = "lost"
"""`stop` of an episode that the pool failed. Its score, usd and reward are NaN: it is no result of the router."""
THEN = " > "
"""Stands between members that were asked one after the other."""
CACHES = ("prompt tokens: ", "cached tokens: ", "USD saved by the cache: ", "USD lost by switches: ")
"""Before a member's name: columns of what its prompt cache did in an episode."""
_KEY = ["router", "set", "seed", "cap", "item"]
_REQUIRED: dict[str, type] = {"router": str, "kind": str, "item": str, "score": float, "usd": float, "reward": float}
_DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "family": "",
    "policy_usd": 0.0,
    "calls": 1.0,
    "member": "",
    "stop": "",
    "cap": math.inf,
    "difficulty": "",
    "seconds": 0.0,
    "valid": 1.0,
    "set": "",
    "curve": "",
    "query": "",
}
_HEADER = b"srpo.evaluation"


@dataclass(frozen=True)
class Episodes:
    """Episodes as a frame, with a header.

    Columns (those with a value in brackets may be left out):
        router      how tables call it
        kind        one of `KINDS`
        item        id of the query, question or task
        score       what counts for the task, 0 to 1: right answers, success
        usd         USD of the whole episode, the policy's own tokens included
        reward      as in training
        seed        of the training, or repetition of a rule (0)
        family      of the item: its dataset or type ("")
        policy_usd  the part of `usd` for the policy's own tokens (0)
        calls       how often a member was asked (1)
        member      who was asked, in order, with `THEN` between; "": nobody, or a mean over several ("")
        stop        how the episode ended; `LOST`: by a fault of the pool ("")
        cap         budget that the router was given (inf)
        difficulty  class of the item ("")
        seconds     the episode took (0)
        valid       1 if nothing that the policy wrote was invalid, else 0 (1)
        set         which held-out set the item is of, where there are several ("")
        curve       routers that are settings of one rule share this name, and span a frontier together ("")
        query       text of the item ("")
    Further numeric columns are further metrics (em, f1, large_calls ...); NaN where a router has none. Those that
    begin as in `CACHES` are a member's.

    The header is JSON: `task`, `split`, `item` (what one is called: query, question, episode), `score` (what the score
    is: right answers, success), `rule` (of the reward), `train_reward` (router -> mean reward on training data that it
    was not fitted on; baselines are chosen by it), `chosen_on` (what that reward is of, where not of training data),
    `note`, and what a task adds.

    Raises:
        ValueError: names the column, router and item that cannot be used.
    """

    frame: pd.DataFrame
    header: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frame = self.frame
        if missing := [name for name in _REQUIRED if name not in frame]:
            raise ValueError(f"the episodes have no column {missing[0]!r}; needed are {', '.join(_REQUIRED)}")
        types = {**_REQUIRED, **{name: type(value) for name, value in _DEFAULTS.items()}}
        frame = frame.assign(**{name: value for name, value in _DEFAULTS.items() if name not in frame})
        frame = frame.assign(
            **{name: frame[name].astype(object if kind is str else kind) for name, kind in types.items()}
        )
        if unknown := sorted(set(frame["kind"]) - set(KINDS)):
            raise ValueError(f"kind {unknown[0]!r} is unknown; use one of {', '.join(KINDS)}")
        numbers = frame[["score", "usd", "reward"]]
        bad = frame[~np.isfinite(numbers).all(axis=1) & (frame["stop"] != LOST)]
        if len(bad):
            row = bad.iloc[0]
            raise ValueError(f"{row['router']} on {row['item']}: score, usd and reward must be finite numbers")
        order = {name: i for i, name in enumerate(dict.fromkeys(frame["router"]))}
        frame = frame.sort_values(_KEY, key=lambda c: c.map(order) if c.name == "router" else c, kind="stable")
        outcome = ["score", "usd", "reward"]
        frame = frame.drop_duplicates([*_KEY, *outcome], ignore_index=True)  # runs share their baselines
        if frame.duplicated(_KEY).any():
            row = frame[frame.duplicated(_KEY)].iloc[0]
            raise ValueError(f"{row['router']} played {row['item']} (seed {row['seed']}) twice, with two outcomes")
        first = [*types, *(name for name in frame if name not in types)]
        object.__setattr__(self, "frame", frame[first])

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def routers(self) -> dict[str, Kind]:
        """Name -> kind, in order of first appearance."""
        return dict(zip(self.frame["router"], self.frame["kind"], strict=True))

    def of(self, **values: Any) -> Episodes:
        """The rows that have these values (one, or a list of several) in these columns."""
        frame = self.frame
        for name, value in values.items():
            frame = frame[frame[name].isin(value if isinstance(value, (list, tuple, set)) else [value])]
        return Episodes(frame, self.header)

    def renamed(self, names: Mapping[str, str]) -> Episodes:
        """With other names for some routers, here and in the header; a setting's curve is renamed with it."""
        header = dict(self.header)
        for key in ("train_reward", "rule"):
            if key in header:
                header[key] = {names.get(name, name): value for name, value in header[key].items()}
        router = self.frame["router"].map(lambda name: names.get(name, name))
        settings = router.str.partition(", ")[0].where(router != self.frame["router"], self.frame["curve"])
        curve = settings.where(self.frame["curve"] != "", "")
        return Episodes(self.frame.assign(router=router, curve=curve), header)

    def mean_reward(self) -> float:
        """Over the episodes that were not lost; NaN where all were."""
        return float(self.frame["reward"].mean())

    @classmethod
    def merged(cls, parts: Sequence[Episodes]) -> Episodes:
        """Shares of several processes, or routers on the same items, as one. What is in two parts alike counts once.

        Raises:
            ValueError: no part, or parts whose headers contradict each other: they are not of one evaluation.
        """
        if not parts:
            raise ValueError("there are no episodes to merge")
        header: dict[str, Any] = {}
        for part in parts:
            _join(header, part.header, "")
        import pandas as pd

        return cls(pd.concat([part.frame for part in parts], ignore_index=True), header)

    def results(self) -> list[dict[str, Any]]:
        """Means of the trained policies on each set, for a model card's metadata; items that the pool lost are left
        out."""
        score, item = str(self.header.get("score", "score")), str(self.header.get("item", "item"))
        found = []
        played = self.frame[(self.frame["kind"] == "policy") & (self.frame["stop"] != LOST)]
        for (name, where), rows in played.groupby(["router", "set"], sort=False):
            means = {score: rows["score"], f"USD per {item}": rows["usd"], "reward": rows["reward"]}
            metrics = {metric: round(float(values.mean()), 8) for metric, values in means.items()}
            found.append({"name": str(name), "dataset": f"held-out {where}".strip(), "metrics": metrics})
        return found

    def write(self, path: str | Path) -> None:
        """Into a parquet file, which appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        header = json.dumps(self.header, sort_keys=True).encode()
        draft = path.with_name(path.name + ".draft")
        pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), _HEADER: header}), draft)
        draft.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> Episodes:
        """Inverse of `write`; of a folder, its `evaluation.parquet`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not one of `write`'s.
        """
        path = Path(path)
        path = path / EPISODES if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; srpo train and srpo evaluate write one at their end")
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: is no parquet file ({error})") from None
        metadata = table.schema.metadata or {}
        if _HEADER not in metadata:
            raise ValueError(f"{path}: holds no evaluation of srpo (its parquet header says nothing of one)")
        return cls(table.to_pandas(), json.loads(metadata[_HEADER]))


@dataclass(frozen=True)
class RewardRule:
    """The training reward: ``score - cost_weight * min(usd / cost_scale, 1) - format_weight * invalid``.

    Raises:
        ValueError: a weight that is negative or not finite, or a scale that is not positive.
    """

    RANGES: ClassVar[Ranges] = {"cost_scale": above(0), "cost_weight": at_least(0), "format_weight": at_least(0)}

    cost_scale: float
    cost_weight: float = 0.2
    format_weight: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self)

    def __call__(self, score: np.ndarray, usd: np.ndarray, valid: np.ndarray | float = 1.0) -> np.ndarray:
        penalty = self.cost_weight * np.minimum(usd / self.cost_scale, 1.0)
        return np.asarray(score - penalty - self.format_weight * (1.0 - valid))


@dataclass(frozen=True)
class Outcomes:
    """What every member makes of every item, known beforehand: recorded, or asked once for each.

    Args:
        items: dicts with query_id, and family and query where there are some.
        members: names of the columns.
        score, usd, reward: ``[items, members]``.
        extra: further metrics, each ``[items, members]``.
        rule: of the reward, for policies whose own tokens cost something or whose actions may be invalid.
    """

    items: Sequence[Mapping[str, Any]]
    members: Sequence[str]
    score: np.ndarray
    usd: np.ndarray
    reward: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    rule: RewardRule | None = None

    def __post_init__(self) -> None:
        shape = (len(self.items), len(self.members))
        for name, values in {"score": self.score, "usd": self.usd, "reward": self.reward, **self.extra}.items():
            if values.shape != shape:
                raise ValueError(f"{name} has the shape {values.shape}; {shape} items and members were given")

    @classmethod
    def of_table(
        cls,
        table: ReplyTable,
        rule: RewardRule,
        split: str = "heldout",
        chosen: Sequence[int] | np.ndarray | None = None,
    ) -> Outcomes:
        """Of the queries of a split; `chosen`: of these, by place in `table.queries(split)`."""
        queries, rows = table.queries(split), slice(None) if chosen is None else np.asarray(chosen, dtype=int)
        score, usd = table.correct_matrix(split)[rows], table.cost_matrix(split)[rows]
        some = queries if chosen is None else [queries[i] for i in chosen]
        return cls(some, table.members, score, usd, rule(score, usd), rule=rule)

    def rows(self, rows: Sequence[int] | np.ndarray) -> Outcomes:
        """Of these items, by place, in this order."""
        items, chosen = [self.items[i] for i in rows], np.asarray(rows, dtype=int)
        own = {name: getattr(self, name)[chosen] for name in ("score", "usd", "reward")}
        extra = {name: values[chosen] for name, values in self.extra.items()}
        return replace(self, items=items, extra=extra, **own)

    def play(
        self,
        name: str,
        kind: Kind,
        routes: Sequence[str | None] | np.ndarray,
        *,
        own_usd: np.ndarray | None = None,
        expected: np.ndarray | None = None,
        seconds: float = 0.0,
        seed: int = 0,
        curve: str = "",
        header: Mapping[str, Any] | None = None,
    ) -> Episodes:
        """Episodes of a router.

        Args:
            name, kind, curve: of the router.
            routes: per item a member's name or None (no valid action: asks nobody, scores 0); or probabilities
                ``[items, members]``, of which exact expectations are taken.
            own_usd: ``[items]`` USD for the router's own tokens, paid for invalid actions too; None: free.
            expected: ``[items, members]`` scores that the router foretells, for its calibration; None: it does not.
            seconds: that it takes to decide.
            seed: of the router's training.
            header: of the episodes.

        Raises:
            ValueError: a route that is no member, another number of routes than items, or an invalid action or own
                cost without a `rule`.
        """
        weights = routes if isinstance(routes, np.ndarray) else self._one_hot(routes)
        if weights.shape != self.score.shape:
            raise ValueError(f"shapes differ: routes {weights.shape}, items and members {self.score.shape}")
        valid, reward = weights.sum(axis=1), self.reward
        own = np.zeros(len(self.items)) if own_usd is None else own_usd
        silent = np.zeros(len(self.items))
        if own.any() or (valid < 1 - 1e-9).any():
            if self.rule is None:
                raise ValueError(f"{name}: the reward of an invalid action is not known without its rule")
            reward = self.rule(self.score, self.usd + own[:, None])
            silent = self.rule(silent, own, 0.0)
        single = weights.max(axis=1) == 1
        columns = {
            "router": name,
            "kind": kind,
            "seed": seed,
            "curve": curve,
            "item": [str(item["query_id"]) for item in self.items],
            "family": [item.get("family", "") for item in self.items],
            "query": [item.get("query", "") for item in self.items],
            "score": (weights * self.score).sum(axis=1),
            "usd": (weights * self.usd).sum(axis=1) + own,
            "reward": (weights * reward).sum(axis=1) + (1 - valid) * silent,
            "policy_usd": own,
            "seconds": seconds,
            "calls": valid,
            "valid": valid,
            "member": [self.members[i] if one else "" for i, one in zip(weights.argmax(1), single, strict=True)],
            **{metric: (weights * values).sum(axis=1) for metric, values in self.extra.items()},
            **({} if expected is None else {"expected": (weights * expected).sum(axis=1)}),
        }
        import pandas as pd

        return Episodes(pd.DataFrame(columns), header or {})

    def _one_hot(self, routes: Sequence[str | None]) -> np.ndarray:
        known = {member: i for i, member in enumerate(self.members)}
        if unknown := sorted({route for route in routes if route is not None and route not in known}):
            raise ValueError(f"routes to {unknown}, but the members are {list(self.members)}")
        weights = np.zeros((len(routes), len(known)))
        for row, route in enumerate(routes):
            if route is not None:
                weights[row, known[route]] = 1.0
        return weights


def named_as(name: str) -> tuple[Kind, str]:
    """Kind and curve of a policy by the name that its run gives it: `start`, and `NAME, SETTING` of one NAME."""
    base, _, setting = name.partition(", ")
    return ("start" if base == "start" else "policy"), base if setting else ""


def _join(header: dict[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Put a header into another one; what stands in both must be the same."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(header.setdefault(key, {}), dict):
            _join(header[key], value, f"{where}{key}.")
        elif header.setdefault(key, value) != value:
            raise ValueError(
                f"these are not episodes of one evaluation: {where}{key} is {header[key]!r} in one part, {value!r} in "
                "another"
            )
