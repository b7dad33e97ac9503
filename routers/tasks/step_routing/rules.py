"""Routing rules to compare a policy with. Each is a function of the situation and a random generator of its own.

They can be pickled, so that other processes can play by them.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence

from routers.tasks.step_routing.arguments import StepRoutingArguments
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


SMALL, LARGE = "always-small", "always-large"
Rules = Mapping[str, tuple[str, Choose]]
"""Name -> (family, rule). A family has one knob, and spans from always-small to always-large, which are in none."""


def rules_of(task: StepRoutingArguments) -> tuple[Rules, int]:
    """The rules to play, and how often each.

    Where calls cost money or steps take time each once, and fewer: two shares, First-Large at the caps of the
    evaluation, two cascades.
    """
    if not task.live and task.environment not in _SLOW:
        return _rules(_SHARES, range(1, 7), range(2, 20, 2)), 3
    counted = task.heldout_caps if task.budget_unit == "large_calls" else []
    caps = [int(cap) for cap in counted if math.isfinite(cap) and cap >= 1]
    late = {max(1, task.step_limit * k // 3) for k in (1, 2)}
    return _rules((0.1, 0.3), caps or [max(1, task.step_limit // 4)], sorted(late)), 1


_SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6)
_SLOW = ("scienceworld", "textworld")
"""Benchmarks whose steps take hundredths of a second, with scripted executors too."""


def _rules(shares: Sequence[float], firsts: Sequence[int], lates: Sequence[int]) -> Rules:
    return {
        SMALL: ("", always_small),
        LARGE: ("", always_large),
        **{f"random mixing {p:g}": ("random mixing", random_mix(p)) for p in shares},
        **{f"first-large {k}": ("first-large", first_large(k)) for k in firsts},
        **{f"cascade {k}": ("cascade", cascade(k)) for k in lates},
    }
