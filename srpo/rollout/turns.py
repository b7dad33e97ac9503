"""A turn that is wanted, a turn that was written, and who writes them: the protocol of generators.

A request carries the *whole* context of its row; what a backend has kept of it from the turn before is its own
business. So the rollout never decodes and encodes again, and every backend can be compared with a plain re-prefill.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # processes that play by rules do not need it
    from torch import Tensor

Recorder = Callable[[list[tuple[int, ...]], "Tensor"], None]
"""(rows, positions [N, S]) after each forward of N sequences x S new columns: `rows[n]` are the request rows that
share sequence n (a group's prompt is forwarded once, what all prompts begin with too), `positions[n, s]` the token's
index in its row's whole sequence, -1 where the column holds none. Rows of a model without a reusable cache are
forwarded again each turn."""


ALL_TOKENS = sys.maxsize
"""For `keep_tokens`: rows wait for their worlds, and every one of them comes back until it is over."""


@dataclass(eq=False)
class State:
    """Where a turn stands that may not go on anyhow: a state of an automaton, as `srpo.rollout.constrained` makes one.

    Attributes:
        allowed: ids that may follow; None: any.
        next: id -> where the turn stands after it.
    """

    allowed: tuple[int, ...] | None
    next: Mapping[int, State]


@dataclass(frozen=True)
class Request:
    """One turn that is wanted."""

    row: int
    """Names the conversation: later turns of a row extend its earlier context."""
    ids: tuple[int, ...]
    """The whole context: prompt and all turns so far. At least one id."""
    seed: str
    max_tokens: int
    """At least 1."""
    choices: tuple[int, ...] | None = None
    """Allowed ids: the turn is then one of them. None: any text."""
    allowed: State | None = None
    """Where this turn begins, if it is free text; None: at the generator's."""
    told: Callable[[Sequence[tuple[Request, Sample]]], object] | None = None
    """Called with the turns of a batch that are written, together, as soon as they are, by a backend that knows then:
    others of the batch may go on."""


@dataclass(frozen=True)
class Sample:
    """One turn that was written."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, of each token as a trainer scores it (`srpo.rollout.generator.draw`; greedy: untempered). vLLM knows them
    under what its cuts left only."""
    ended: bool
    """By an end token, a stop string or a choice; False: it was cut at `max_tokens`."""
    scores: tuple[float, ...] = ()
    """Of a request with choices: nats of each of them, in their order; they sum to probability 1."""


class Generator(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """One turn per request, in their order. Rows that are left out may come back."""

    def over(self, rows: Sequence[int]) -> None:
        """These rows do not come back: their caches may be dropped."""

    def finish(self) -> None:
        """This process asks for nothing more; returns when no other process needs its help."""
