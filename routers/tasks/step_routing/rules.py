"""Routing rules to compare a policy with. Each is a function of the situation and a random generator of its own.

They can be pickled, so that other processes can play by them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from routers.tasks.step_routing.environment import Choose, Situation


def always_small(situation: Situation, affordable: Sequence[str]) -> str:
    """The cheapest executor, always."""
    return affordable[0]


def always_large(situation: Situation, affordable: Sequence[str]) -> str:
    """The most expensive executor that is affordable."""
    return affordable[-1]


def random_mix(p_large: float) -> Choose:
    """The expensive executor with probability `p_large` at every step, independent of everything."""
    return functools.partial(_random_mix, p_large)


def first_large(calls: float) -> Choose:
    """First-Large: the expensive executor for the first `calls` steps, then the cheapest.

    A fraction is a coin per episode: 1.3 is one call, and a second in 30 % of the episodes.
    """
    return functools.partial(_first_large, calls)


def cascade(after: int) -> Choose:
    """The cheapest executor for `after` steps; then the expensive one, if the episode is not over by then."""
    return functools.partial(_cascade, after)


def _random_mix(p_large: float, situation: Situation, affordable: Sequence[str]) -> str:
    step = len(situation.calls)
    draw = random.Random(f"mix/{p_large}/{situation.view.seed}/{step}").random()
    return affordable[-1] if draw < p_large else affordable[0]


def _first_large(calls: float, situation: Situation, affordable: Sequence[str]) -> str:
    whole = int(calls)
    extra = random.Random(f"first/{situation.view.seed}").random() < calls - whole
    return affordable[-1] if len(situation.calls) < whole + extra else affordable[0]


def _cascade(after: int, situation: Situation, affordable: Sequence[str]) -> str:
    return affordable[0] if len(situation.calls) < after else affordable[-1]
