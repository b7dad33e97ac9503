"""How one answer of an agent is drawn, where a question says it: questions of several ways share one model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Generator, Request, Sample

MOST_WAYS = 16
"""Generators that are kept; what they share is the model."""


@dataclass(frozen=True)
class Drawing:
    """What a question says of its answer; None: as the agent does it."""

    temperature: float | None = None
    """0: the likeliest token."""
    top_p: float | None = None
    """In (0, 1]."""
    seed: int | None = None
    """The same question, seed and replies of members give the same answer."""
    tokens: int | None = None
    """Of the policy's turns, and of what it reads in between, together; at most the agent's own limit counts."""

    def sampling(self, usual: Sampling) -> Sampling:
        """ValueError for a number out of its range."""
        temperature = usual.temperature if self.temperature is None else float(self.temperature)
        return replace(usual, temperature=temperature, top_p=usual.top_p if self.top_p is None else float(self.top_p))


@dataclass(frozen=True)
class DrawnRequest(Request):
    """A turn that is wanted, and how it is drawn."""

    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, request: Request, sampling: Sampling) -> DrawnRequest:
        return cls(**{one.name: getattr(request, one.name) for one in fields(Request)}, sampling=sampling)


class BySampling:
    """A `Generator` whose requests say how they are drawn, else as usual. Those that are drawn alike share a batch.

    Args:
        make: a generator that draws so, of the one model.
        usual: of requests that do not say it.
    """

    def __init__(self, make: Callable[[Sampling], Generator], usual: Sampling) -> None:
        self._make, self._usual = make, usual
        self._made: OrderedDict[Sampling, Generator] = OrderedDict()

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        ways = [getattr(request, "sampling", self._usual) for request in requests]
        found: dict[int, Sample] = {}
        for way in dict.fromkeys(ways):
            places = [i for i, one in enumerate(ways) if one == way]
            samples = self._generator(way).generate([requests[i] for i in places])
            found.update(zip(places, samples, strict=True))
        return [found[i] for i in range(len(requests))]

    def over(self, rows: Sequence[int]) -> None:
        for generator in self._made.values():
            generator.over(rows)

    def finish(self) -> None:
        for generator in self._made.values():
            generator.finish()

    def _generator(self, way: Sampling) -> Generator:
        if way not in self._made:
            self._made[way] = self._make(way)
        self._made.move_to_end(way)
        while len(self._made) > MOST_WAYS:
            self._made.popitem(last=False)
        return self._made[way]
