"""Scripted policies and pools for tests of think/route agents: real environment, real rollout loop, no model."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripted import Fault, Scripted

from routers.data.catalogue import Member
from routers.language.actions import Tags
from routers.pool import Ledger, Pool, ReplyCache, Retry
from routers.tasks.think_route.environment import ThinkRoute
from srpo.rollout.turns import Request, Sample
from srpo.types import Observation, Stop

ROW = {"query": "What is the capital of France?", "gold": ["Paris"], "query_id": "q1"}
# 10 prompt and 5 completion tokens a call: 10*1 + 5*2 = 20 and 10*10 + 5*20 = 200 millionths of a dollar.
CATALOGUE = {
    "small": Member("small", "well-known facts", 1.0, 2.0),
    "large": Member("large", "hard questions", 10.0, 20.0),
}
SMALL_USD, LARGE_USD = 20e-6, 200e-6
ROUTE = "<think>I do not know.</think><search>small: capital of France?</search>"
ROUTE_LARGE = "<think>Hard.</think><search>large: capital of France?</search>"
RIGHT, WRONG = "<think>So.</think><answer>Paris</answer>", "<think>So.</think><answer>Rome</answer>"


def pool(
    reply: str | Callable[[str], str] = "It is Paris.",
    faults: Sequence[Fault | None] = (),
    ledger: Ledger | None = None,
    cache: ReplyCache | None = None,
    seconds: float = 0.0,
) -> Pool:
    """Two members that give the same reply; `small` has the faults."""
    backends = {
        "small": Scripted(reply, faults=faults, seconds=seconds, cached_as="small" if cache else None),
        "large": Scripted(reply, seconds=seconds, cached_as="large" if cache else None),
    }
    return Pool(CATALOGUE, backends, ledger=ledger, cache=cache, retry=Retry(attempts=1))


def world(reply: str | Callable[[str], str] = "It is Paris.", **settings: Any) -> ThinkRoute:
    made = {name: settings.pop(name) for name in ("faults", "ledger", "cache", "seconds") if name in settings}
    chosen = [CATALOGUE.get(name, Member(name, "unknown")) for name in settings.pop("members", CATALOGUE)]
    how = {name: settings.pop(name) for name in ("grammar", "forward_empty") if name in settings}
    return ThinkRoute(pool(reply, **made), Tags(chosen, **how), **settings)


def asked(environment: ThinkRoute, member: str) -> list[str]:
    """Every query that reached a member."""
    return environment.pool._callers[member].backend.queries  # type: ignore[attr-defined]


def episode(
    environment: ThinkRoute, turns: Sequence[str], row: Mapping[str, Any] = ROW
) -> tuple[dict[str, Any], list[Observation]]:
    """Columns and observations of a policy that writes `turns`, whatever it is told; "turns" if it never ends."""

    async def run() -> tuple[dict[str, Any], list[Observation]]:
        played, seen = environment.episode(row, "seed"), []
        stop: Stop = "turns"
        for text in turns:
            seen.append(await played.step(text))
            if seen[-1].end is not None:
                stop = seen[-1].end  # type: ignore[assignment]
                break
        return dict(played.columns(stop)), seen

    return asyncio.run(run())


class Script:
    """A generator (`generator.Generator`) that writes given token ids: `turns[row][t]` in turn t of a row."""

    def __init__(self, turns: Sequence[Sequence[Sequence[int]]]):
        self._turns = turns
        self._next = [0] * len(turns)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        samples = []
        for request in requests:
            ids = tuple(self._turns[request.row][self._next[request.row]])
            self._next[request.row] += 1
            samples.append(Sample(ids, (-1.0,) * len(ids), True))
        return samples

    def over(self, rows: Sequence[int]) -> None:
        pass

    def finish(self) -> None:
        pass


def reward(scheme: tuple[list[Callable[..., Any]], list[float]], columns: Mapping[str, Any]) -> float:
    """The weighted sum of a reward scheme on one completion."""
    functions, weights = scheme
    batch = {name: [value] for name, value in columns.items()}
    return sum(w * f(completions=[""], **batch)[0] for f, w in zip(functions, weights, strict=True))
