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


def check_eval_rows(dataset: Any, args: Any, generations: int) -> None:
    """Raise NoSteps where an evaluation would have no batch.

    Args:
        dataset: rows, or several by name.
        generations: completions per row.
    """
    parts = dataset if isinstance(dataset, Mapping) else {"the evaluation data": dataset}
    for name, rows in parts.items():
        if not hasattr(rows, "__len__"):
            continue
        batch = args.per_device_eval_batch_size * args.world_size
        if not len(rows) or (args.dataloader_drop_last and len(rows) * generations < batch):
            raise NoSteps(
                f"{name} has {len(rows)} rows: not one batch of {batch} completions, {generations} per row; give more "
                "rows, a smaller per_device_eval_batch_size, or dataloader_drop_last: false"
            )


def check_start(rows: Any, args: Any, checkpoint: Any = None) -> None:
    """Raise NoSteps for training data of less than a batch, or a checkpoint that leaves no step.

    Args:
        rows: the training data.
        checkpoint: `resume_from_checkpoint` of a Trainer.
    """
    if hasattr(rows, "__len__"):
        check_rows_of_a_batch(len(rows), args)
    if isinstance(checkpoint, (str, Path)) and 0 < args.max_steps < (made := checkpoint_step(Path(checkpoint))):
        raise NoSteps(
            f"{checkpoint} is of step {made} already, and max_steps is {args.max_steps}: raise max_steps, or resume "
            "from an earlier checkpoint"
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
