"""Where in its data and in a generation batch a run is, from the number of its optimiser steps: for a run taken up.

    an epoch of M micro-steps  ->  ceil(M / a) optimiser steps of a micro-steps each, the last one of what is left

M is a multiple of the micro-steps that a generation batch feeds, and need not be one of `gradient_accumulation_steps`.
"""

import sys
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
    """Where a trainer is. Begins its reference and teacher with a training, also one that is resumed, and moves the
    teacher once per generation batch.

    Attributes:
        calendar: of the run, once its data are known.
        sampler: TRL's, of the training data; None before there is one.
        generate_every: micro-steps that one generation batch feeds.
        evaluated: batches of the evaluation under way.
    """

    def __init__(self, trainer: Any, args: Any) -> None:
        self.trainer, self.args = trainer, args
        self.sampler: Any = None
        self.calendar = calendar_of(None, args)
        self.evaluated = 0
        self.generate_every = args.steps_per_generation * args.num_iterations

    @property
    def now(self) -> tuple[int, int]:
        """Optimiser steps made, and micro-steps of the next one."""
        return self.calendar.when(self.trainer._step)

    @property
    def between_batches(self) -> bool:
        """Whether no generation batch is half used."""
        return bool(self.trainer._step % self.generate_every == 0)

    def part(self, training: bool) -> int:
        """`GenerationStep.part` of the generation batch that begins."""
        if training:
            return self.now[1]
        self.evaluated += 1
        return self.evaluated - 1

    def next_batch(self, max_steps: int) -> tuple[int, tuple[int, int]] | None:
        """Number of the next generation batch, optimiser steps made before it, and micro-steps of the next one; None:
        the run of `max_steps` has no other."""
        number = self.trainer._step // self.generate_every + 1
        first = number * self.generate_every
        return None if first >= self.calendar.micro_steps(max_steps) else (number, self.calendar.when(first))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.reference.begin()
        if trainer.teacher is not None:
            trainer.teacher.begin()
        # TRL counts micro-steps from 0 in each process; a resumed run must know where in a generation batch it is.
        self.calendar = calendar_of(self.sampler, self.args)
        trainer._step = self.calendar.micro_steps(state.global_step)
        wind(self.sampler, state.global_step // self.calendar.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.teacher is not None and self.between_batches and not trainer.bad_steps.skipped:
            trainer.teacher.update()
