"""A run that would train on nothing, or did, is an error: counted in rows before it starts, looked at when it ends.

    rows of one batch of rollouts = generation_batch_size / num_generations
    generation_batch_size         = per_device_train_batch_size x processes x steps_per_generation

TRL's sampler leaves out a last incomplete batch. With fewer rows than one batch it has none at all: transformers then
warns, makes 0 steps and reports a finished run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NoSteps(ValueError):
    """Nothing would be, or was, trained; says how many rows are needed, and where the number comes from."""


def check_rows_of_a_batch(rows: int, args: Any, what: str = "the training data") -> None:
    """Raise NoSteps where `rows` do not fill one batch of rollouts of all processes.

    Args:
        args: an `SRPOConfig`, whose batch sizes are those of all processes.
        what: holds the rows, for the message.
    """
    needed = args.generation_batch_size // args.num_generations
    if rows >= needed:
        return
    processes = args.generation_batch_size // (args.per_device_train_batch_size * args.steps_per_generation)
    raise NoSteps(
        f"{what} has {rows} usable rows, and one batch of rollouts takes {needed}: per_device_train_batch_size "
        f"{args.per_device_train_batch_size} x {processes} processes x steps_per_generation "
        f"{args.steps_per_generation} / num_generations {args.num_generations}. Not one step would be made: use more "
        "rows, or smaller batches (per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation)"
    )


def check_steps_made(steps: int, what: str = "the training") -> None:
    """Raise NoSteps where a training has ended without an optimiser step."""
    if steps < 1:
        raise NoSteps(f"{what} made no step, so nothing was trained: its data gave no whole batch")


class StepsMixin:
    """Both checks around `train`, and rows for every evaluation, for `srpo.trainer.trainer.SRPOTrainer`."""

    args: Any
    eval_dataset: Any
    num_generations_eval: int
    state: Any
    train_dataset: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        if hasattr(self.train_dataset, "__len__"):
            check_rows_of_a_batch(len(self.train_dataset), self.args)
        if self.args.eval_strategy != "no":
            self._check_eval_rows(self.eval_dataset)
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._check_checkpoint(Path(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint, *rest, **kwargs)  # type: ignore[misc]
        check_steps_made(self.state.global_step)
        return output

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **kwargs: Any) -> Any:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, str):
            self._check_eval_rows(given)
        return super().evaluate(eval_dataset, *rest, **kwargs)  # type: ignore[misc]

    def _check_eval_rows(self, dataset: Any) -> None:
        parts = dataset if isinstance(dataset, Mapping) else {"the evaluation data": dataset}
        for name, rows in parts.items():
            if not hasattr(rows, "__len__"):
                continue
            batch = self.args.per_device_eval_batch_size * self.args.world_size
            if not len(rows) or (self.args.dataloader_drop_last and len(rows) * self.num_generations_eval < batch):
                raise NoSteps(
                    f"{name} has {len(rows)} rows: not one batch of {batch} completions, {self.num_generations_eval} "
                    "per row; give more rows, a smaller per_device_eval_batch_size, or dataloader_drop_last: false"
                )

    def _check_checkpoint(self, folder: Path) -> None:
        made = checkpoint_step(folder)
        if 0 < self.args.max_steps < made:
            raise NoSteps(
                f"{folder} is of step {made} already, and max_steps is {self.args.max_steps}: raise max_steps, or "
                "resume from an earlier checkpoint"
            )


def checkpoint_step(folder: Path) -> int:
    """The optimiser steps of a checkpoint.

    Raises:
        FileNotFoundError: it is no checkpoint; names those that lie beside it.
    """
    state = folder / "trainer_state.json"
    if state.is_file():
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    beside = [path for path in (folder, folder.parent) if path.is_dir()]
    names = sorted({str(path.parent) for place in beside for path in place.glob("checkpoint-*/trainer_state.json")})
    what = "holds no trainer_state.json, so it is no checkpoint" if folder.is_dir() else "does not exist"
    there = f"; there are {', '.join(names)}" if names else "; there is no checkpoint beside it"
    raise FileNotFoundError(f"resume_from_checkpoint: {folder} {what}{there}")
