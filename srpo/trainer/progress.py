"""What a run prints: named phases, one short line per logging step, and no warning that a user can do nothing about.

    [start] 1,285 queries, 5 members
    [train] step 5/60 | reward 0.312 | score 0.451 | $0.000021/query | invalid 3.1 % | 812 tokens/s | 4 min left

All metrics are in OUTPUT (`trainer_state.json`) and wherever `report_to` says; the screen shows these few. Bars are
drawn on a terminal only: in a log file each of their states would be a line.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging as transformers_logging

from srpo.run.watch import enter

_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # A CPU run: torch says that a default of the Trainer has no effect there.
    (UserWarning, r"'pin_memory' argument is set as true but no accelerator is found"),
    # TRL asks transformers by a name that transformers wants to retire; both are theirs.
    (FutureWarning, "`gradient_checkpointing` is deprecated"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # The hook by which our rollouts enter TRL's trainer; the release of TRL is pinned, and tests watch its hooks.
    (UserWarning, r"You are using 'rollout_func', which is an experimental feature"),
)
_LOGS: tuple[tuple[str, str], ...] = (
    # DeepSpeed, which is installed and was not asked for, tells which device it found.
    ("DeepSpeed", r"Setting (ds_)?accelerator to"),
)


def phase(name: str, text: str = "") -> None:
    """One line about what begins, or what it found: `[name] text`. Said by the first process only, noted by all."""
    enter(name)
    if os.environ.get("RANK", "0") == "0":
        print(f"[{name}] {text}".rstrip(), flush=True)


def quiet() -> None:
    """Leave out what `_WARNINGS` and `_LOGS` list, with the reason beside each; and bars where nobody watches them."""
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    for name, message in _LOGS:
        logger, pattern = logging.getLogger(name), re.compile(message)
        if not any(isinstance(found, _Leave) and found.pattern == pattern for found in logger.filters):
            logger.addFilter(_Leave(pattern))
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


class _Leave(logging.Filter):
    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


def check_report_to(targets: str | Iterable[str]) -> None:
    """Refuse a `report_to` that transformers does not know, or whose package is missing, before a run begins.

    Raises:
        ValueError: says what there is, or what to install.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
    for target in [targets] if isinstance(targets, str) else targets:
        if target in ("none", "all"):
            continue
        if target not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to: there is no {target!r}; there are none, all, {known}")
        if not any(importlib.util.find_spec(name) for name in packages.get(target, (target,))):
            raise ValueError(f"report_to: {target} needs a package that is not installed: pip install {target}")


def show_progress(trainer: Trainer, name: str) -> None:
    """Give a trainer (ours, or the supervised start's) the lines of this module instead of transformers' own."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(name))


class Progress(ProgressCallback):
    """One line per log, and on a terminal a bar below.

    Args:
        name: of the phase.
    """

    def __init__(self, name: str = "train") -> None:
        super().__init__()
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            hidden = True if args.disable_tqdm else None  # None: on a terminal only
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=hidden
            )
        self.current_step = self._first = state.global_step
        self._began = self._last = time.monotonic()
        self._tokens = float(state.num_input_tokens_seen)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs or "train_runtime" in logs:
            return
        now = time.monotonic()
        steps, tokens = state.global_step - self._first, logs.get("num_tokens")
        left = (now - self._began) / steps * (state.max_steps - state.global_step) if steps else math.nan
        speed = None if tokens is None else (tokens - self._tokens) / max(now - self._last, 1e-9)
        self._tokens, self._last = self._tokens if tokens is None else tokens, now
        text = line(logs, state.global_step, state.max_steps, tokens_per_second=speed, seconds_left=left)
        tqdm.write(f"[{self._name}] {text}", file=sys.stdout)
        sys.stdout.flush()


def line(
    logs: Mapping[str, Any],
    step: int,
    steps: int,
    *,
    tokens_per_second: float | None = None,
    seconds_left: float = math.nan,
) -> str:
    """The numbers of one log that a person looks at; what is not there is left out.

    Args:
        logs: metrics by the names under which they are logged.
        step, steps: done, of all.
        tokens_per_second: that were read and written since the last log.
        seconds_left: of the training.
    """
    parts = [f"step {step}/{steps}"]
    evaluated = "eval_reward" if "eval_reward" in logs else "reward"
    for name, key in (("reward", evaluated), ("score", "correct/mean"), ("loss", "loss")):
        if _is_number(logs.get(key)) and (name != "loss" or len(parts) == 1):  # the loss says little beside a reward
            parts.append(f"{name} {logs[key]:.3f}")
    if _is_number(logs.get("cost/per_query_usd")):
        parts.append(f"${logs['cost/per_query_usd']:.3g}/query")
    if _is_number(logs.get("invalid/share")):
        parts.append(f"invalid {100 * logs['invalid/share']:.1f} %")
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if math.isfinite(seconds_left):
        parts.append(f"{duration(seconds_left)} left" if step < steps else "done")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `4 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
