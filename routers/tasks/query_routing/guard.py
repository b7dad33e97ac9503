"""Says with figures, and may stop the run, when names collapse onto one member though by the table routing pays."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
SHARE, MARGIN, STEPS = 0.95, 0.02, 5
"""One member's share of the routes; what routing earns above it; for so many logged steps in a row."""


def routing_pays(reward: np.ndarray, families: list[str]) -> tuple[float, float, float]:
    """Of rewards [queries, members]: the best single member's mean, that of the best per family, and the oracle's."""
    names = np.array(families)
    told = sum(reward[names == name].mean(axis=0).max() * (names == name).mean() for name in sorted(set(families)))
    return float(reward.mean(axis=0).max()), float(told), float(reward.max(axis=1).mean())


class Collapse(TrainerCallback):
    """Looks at the sampled routes of every log.

    Args:
        reward, families: of the training queries, as in `routing_pays`.
        stop: end the training; else it is said and goes on.
    """

    def __init__(self, reward: np.ndarray, families: list[str], *, stop: bool) -> None:
        self.single, self.told, self.oracle = routing_pays(reward, families)
        self.stop, self._streak = stop, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shares = {key: value for key, value in (logs or {}).items() if key.startswith("route/share/")}
        if not shares or self.oracle - self.single <= MARGIN:
            return
        top = max(shares, key=lambda key: shares[key])
        self._streak = self._streak + 1 if shares[top] > SHARE and not top.endswith("/none") else 0
        if self._streak != STEPS:
            return
        control.should_training_stop |= self.stop
        what_now = "Lower learning_rate, raise temperature or sft_temperature, or stop here: on_collapse: stop"
        logger.warning(
            f"step {state.global_step}: {top.removeprefix('route/share/')} takes {shares[top]:.1%} of the routes, but "
            f"routing pays: on the training queries the best single member earns {self.single:.3f}, the best of each "
            f"family {self.told:.3f}, the best of each query {self.oracle:.3f}. "
            + ("The training stops here (on_collapse: stop)" if self.stop else what_now)
        )
