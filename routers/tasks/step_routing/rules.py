"""Routing rules to compare a policy with. Each is a function of the situation and a random generator of its own.

They can be pickled, so that other processes can play by them, and choose among the affordable executors only, so that
every cap holds for them too. Beside the members alone, by families with one knob:

    random mixing P     every step's own coin
    first-large K       the expensive one for K steps
    cascade N           the cheapest for N steps, then the expensive one
    sticky P            one coin per episode: never a switch, so no prompt cache is thrown away
    escalate N          on error: the expensive one for N steps after each (inf: for good)
    explore K           the cheapest for K steps; if one of them went wrong, the expensive one for the rest
    time-boxed N        N steps each, in turns, the cheapest first
    arbitrage W         the expensive one where its estimated advantage, less W x its price, is positive

Sources: explore is SWE-Router (arXiv 2607.00053), which escalates once, after K turns, where a learned value of going
on is below that of escalating; INFERRED: an error in place of the learned value. arbitrage is Arbitrage (arXiv
2512.05033), which escalates a step where a learned advantage of the target model over the draft is positive; INFERRED:
decided before a draft is paid, by `advantages.py`. The rest are common sense.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from routers.environments.protocol import NOTHING_HAPPENS
from routers.language.digest import Head, failed
from routers.tasks.step_routing.advantages import Advantages, state_of
from routers.tasks.step_routing.arguments import StepRoutingArguments
from routers.tasks.step_routing.environment import Choose, Situation
from routers.tasks.step_routing.prompts import OBSERVATIONS


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


def sticky(p_large: float) -> Choose:
    """The expensive executor for the whole episode with probability `p_large`, else the cheapest."""
    return functools.partial(_sticky, p_large)


def escalate(steps: float) -> Choose:
    """On error: the expensive executor for so many steps after each step that went wrong; inf: for good."""
    return functools.partial(_escalate, steps)


def explore(turns: int) -> Choose:
    """The cheapest for `turns` steps, then one decision for the rest: the expensive one if any of them went wrong."""
    return functools.partial(_explore, turns)


def time_boxed(steps: int) -> Choose:
    """`steps` steps of the cheapest, as many of the expensive one, and so on."""
    return functools.partial(_boxes, steps)


def arbitrage(advantages: Advantages, weight: float, observation: str) -> Choose:
    """The expensive executor where its estimated advantage, less `weight` times its price, is positive.

    Args:
        advantages: estimated with this `observation`.
        weight: points of success for the price of an episode of the expensive executor alone.
        observation: what tells states apart, a name of `OBSERVATIONS`.
    """
    return functools.partial(_arbitrage, advantages, weight, observation)


def went_wrong(observation: str) -> bool:
    """Whether a step's observation is an error: in a digest that of the last tools, else what looks like one."""
    try:
        return Head.read(observation).after == "error"
    except ValueError:
        return NOTHING_HAPPENS in observation or failed({"content": observation})


def _sticky(p_large: float, situation: Situation, affordable: Sequence[str]) -> str:
    draw = random.Random(f"sticky/{situation.view.seed}").random()
    return affordable[-1] if draw < p_large else affordable[0]


def _escalate(steps: float, situation: Situation, affordable: Sequence[str]) -> str:
    taken = situation.view.steps
    recent = taken if math.isinf(steps) else taken[len(taken) - min(int(steps), len(taken)) :]
    return affordable[-1] if any(went_wrong(step.observation) for step in recent) else affordable[0]


def _explore(turns: int, situation: Situation, affordable: Sequence[str]) -> str:
    explored = situation.view.steps[:turns]
    if len(explored) < turns:
        return affordable[0]
    return affordable[-1] if any(went_wrong(step.observation) for step in explored) else affordable[0]


def _boxes(steps: int, situation: Situation, affordable: Sequence[str]) -> str:
    return affordable[-1] if len(situation.calls) // steps % 2 else affordable[0]


def _arbitrage(
    advantages: Advantages, weight: float, observation: str, situation: Situation, affordable: Sequence[str]
) -> str:
    state = state_of(OBSERVATIONS[observation].describe(situation) if situation.view.steps else None)
    return affordable[-1] if advantages.gain(state) > weight * advantages.price else affordable[0]


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
FAMILIES: Mapping[str, Callable[[Any], Choose]] = {
    SMALL: lambda _: always_small,
    LARGE: lambda _: always_large,
    "random mixing": random_mix,
    "first-large": first_large,
    "cascade": cascade,
    "sticky": sticky,
    "escalate": escalate,
    "explore": lambda turns: explore(int(turns)),
    "time-boxed": lambda steps: time_boxed(int(steps)),
}
"""Name -> rule by its knob; arbitrage needs its estimates besides."""
Rules = Mapping[str, tuple[str, Choose]]
"""Name -> (family, rule). A family has one knob, and spans from always-small to always-large, which are in none."""


def rules_of(task: StepRoutingArguments, advantages: Advantages | None = None) -> tuple[Rules, int]:
    """The rules to play, and how often each.

    Where calls cost money or steps take time each once, and fewer: two shares, First-Large at the caps of the
    evaluation, two cascades, `escalate inf` and `explore 3`.

    Args:
        advantages: of the training tasks; None: without arbitrage.
    """
    if estimates_advantages(task):
        return {
            **_rules(_SHARES, range(1, 7), range(2, min(20, task.step_limit), 2)),
            **{f"sticky {p:g}": ("sticky", sticky(p)) for p in (0.1, 0.3, 0.6)},
            **{f"escalate {n:g}": ("escalate on error", escalate(n)) for n in (1, 3, math.inf)},
            **{f"explore {k}": ("explore", explore(k)) for k in (2, 4)},
            **{f"time-boxed {n}": ("time-boxed", time_boxed(n)) for n in (2, 5)},
            **{
                f"arbitrage {w:g}": ("arbitrage", arbitrage(advantages, w, task.observation))
                for w in (0.0, 1.0, 3.0)
                if advantages is not None
            },
        }, 3
    counted = task.heldout_caps if task.budget_unit == "large_calls" else []
    caps = [int(cap) for cap in counted if math.isfinite(cap) and cap >= 1]
    late = {max(1, task.step_limit * k // 3) for k in (1, 2)}
    few = {"escalate inf": ("escalate on error", escalate(math.inf)), "explore 3": ("explore", explore(3))}
    return {**_rules((0.1, 0.3), caps or [max(1, task.step_limit // 4)], sorted(late)), **few}, 1


def estimates_advantages(task: StepRoutingArguments) -> bool:
    """Whether episodes are cheap enough for all rules, and for an estimate of advantages."""
    return not task.live and task.environment not in _SLOW


_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
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
