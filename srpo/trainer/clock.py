"""Where in its data and in a generation batch a run is, from the number of its optimiser steps: for a run taken up.

    an epoch of M micro-steps  ->  ceil(M / a) optimiser steps of a micro-steps each, the last one of what is left

M is a multiple of the micro-steps that a generation batch feeds, and need not be one of `gradient_accumulation_steps`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback


@dataclass(frozen=True)
class Calendar:
    """Of a run with `epoch` micro-steps in each epoch, and at most `accumulation` in an optimiser step."""

    accumulation: int
    epoch: int = sys.maxsize

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.epoch // self.accumulation)

    def micro_steps(self, steps: int) -> int:
        """Of so many optimiser steps together."""
        epochs, rest = divmod(steps, self.steps)
        return epochs * self.epoch + rest * self.accumulation

    def when(self, micro_steps: int) -> tuple[int, int]:
        """(optimiser steps, micro-steps of the next one) that have been made after so many micro-steps."""
        epochs, rest = divmod(micro_steps, self.epoch)
        whole, part = divmod(rest, self.accumulation)
        return epochs * self.steps + whole, part


def calendar_of(sampler: Any, args: Any) -> Calendar:
    """Of TRL's sampler, which gives a generation batch once for each micro-step; None: there is none yet, or its data
    have no end."""
    batches = 0 if sampler is None else len(sampler) // args.generation_batch_size
    return Calendar(args.gradient_accumulation_steps, batches or sys.maxsize)


def wind(sampler: Any, epochs: int) -> None:
    """Bring TRL's sampler to where it is after `epochs`: it draws one permutation in each."""
    if sampler is not None and sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


class Clock(TrainerCallback):
    """Calls `begin(state)` when training begins, also when it is resumed, and `end()` after each optimiser step."""

    def __init__(self, begin: Callable[[Any], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()
