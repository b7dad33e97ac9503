"""What stops a run, and a warning of TRL's that lost rollouts would repeat.

A limit is a callback that ends the training with a checkpoint; `conclude`, once it has ended, raises the cause.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

from srpo.run.signals import Signals
from srpo.trainer.metrics import Alarms, Losses
from srpo.trainer.rollouts import Rollouts
from srpo.types import Stopped

logger = logging.get_logger(__name__)


class LostRollouts(Stopped):
    """Too many rollouts were lost; a checkpoint has been saved."""


class Alarmed(Stopped):
    """The run has been degenerate in a way that `stop_on` names; a checkpoint has been saved."""


@contextmanager
def without_trl_warning() -> Iterator[None]:
    """TRL prints a whole row that no function has scored; lost rollouts are meant to have no score."""

    def quiet(record: Any) -> bool:
        return not str(record.msg).startswith("[RANK") or "All reward functions returned None" not in str(record.msg)

    trl = getLogger("trl.trainer.grpo_trainer")
    trl.addFilter(quiet)
    try:
        yield
    finally:
        trl.removeFilter(quiet)


class EndOnSignal(TrainerCallback):
    """Ends the training after a step, with a checkpoint, when a process of it has been asked to end.

    Attributes:
        agreed: all processes know.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.signals, self.agreed = accelerator, Signals(), False

    def agree(self) -> bool:
        """All processes call this."""
        asked = torch.tensor(float(bool(self.signals.asked)), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, reduction="sum")
        self.agreed = bool(asked > 0)
        return self.agreed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():  # during the evaluation: no other step first
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            control.should_training_stop = True


class EarlyWarnings(TrainerCallback):
    """Lets the alarms see what is logged, and ends a run with a checkpoint where one of `stop_on` speaks."""

    def __init__(self, alarms: Alarms, stop_on: Sequence[str], max_length: int) -> None:
        self.alarms, self.stop_on, self.max_length, self.verdict = alarms, {*stop_on}, max_length, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.verdict = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, float)}
        evaluated = any(name.startswith("eval_") for name in numbers)
        if not evaluated and "loss" not in numbers:
            return  # the summary of a training
        self.alarms.observe_log(numbers, not evaluated, self.max_length)
        if self.stop_on and not self.verdict:
            mine = [f"{name}: {words}" for name, words in self.alarms.said.items() if name in self.stop_on]
            self.verdict = next(iter(gather_object(mine[:1])), "")
            if self.verdict:
                control.should_save = control.should_training_stop = True

    def conclude(self, args: Any) -> None:
        if self.verdict:
            raise Alarmed(f"stop_on {self.verdict}. A checkpoint was saved in {args.output_dir}")


class RunLimits(TrainerCallback):
    """Stops a run that has spent its money or loses its rollouts, with a checkpoint."""

    def __init__(self, losses: Losses, rollouts: Rollouts | None) -> None:
        self.losses, self.rollouts = losses, rollouts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reason = self.losses.verdict or (self.rollouts and self.rollouts.stop_because)
        if reason is not None and not control.should_training_stop:
            logger.warning("The run stops, with a checkpoint: %s", reason)
            control.should_save = control.should_training_stop = True

    def conclude(self, args: Any) -> None:
        if self.losses.verdict is not None:
            raise LostRollouts(f"{self.losses.verdict}. A checkpoint was saved in {args.output_dir}")
