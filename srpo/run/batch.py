"""The batch of a run from two numbers, `prompts_per_step` and `num_generations`; on any number of processes.

    prompts_per_step x num_generations = per_device_train_batch_size x processes x gradient_accumulation_steps

`per_device_train_batch_size` is a matter of memory alone, and gradient accumulation follows. A batch of rollouts feeds
one optimiser step, unless `generation_batch_size` (TRL's key, in completions) is a multiple of a step's completions.
In verl the three are called ppo_mini_batch_size, rollout.n, and train_batch_size (in prompts).
"""

from __future__ import annotations

import math
import os
from typing import Any


class BatchMistake(ValueError):
    """Sizes of a batch that contradict one another, or the number of processes."""


def processes_of_launch() -> int:
    """How many processes this one was launched with, before any of them has met another."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def accumulation(args: Any, processes: int) -> int:
    """`gradient_accumulation_steps` on so many processes; where `prompts_per_step` is not set, as it was given.

    Raises:
        BatchMistake: the completions of a step cannot be shared out so; says what can.
    """
    given = args.gradient_accumulation_steps
    if args.prompts_per_step is None:
        return 1 if given is None else int(given)
    prompts, group, size = args.prompts_per_step, args.num_generations, args.per_device_train_batch_size
    completions, at_once = prompts * group, size * processes
    if completions % at_once:
        what = f"prompts_per_step {prompts} x num_generations {group} = {completions} completions cannot be shared by "
        if completions % processes:
            least = processes // math.gcd(processes, group)
            raise BatchMistake(f"{what}{processes} processes: set prompts_per_step to a multiple of {least}")
        fits = max(n for n in range(1, size) if completions // processes % n == 0)
        raise BatchMistake(
            f"{what}{processes} process{'es' if processes > 1 else ''} with per_device_train_batch_size {size}: set "
            f"that to {fits}"
        )
    return completions // at_once


def settle_batch(args: Any, processes: int) -> None:
    """Set `gradient_accumulation_steps`, before TRL derives what it derives.

    Raises:
        BatchMistake: see `accumulation`; or what is derived was given, with another value.
    """
    found, given = accumulation(args, processes), args.gradient_accumulation_steps
    if args.prompts_per_step is not None:
        completions = args.prompts_per_step * args.num_generations
        if given not in (None, found):
            raise BatchMistake(
                f"gradient_accumulation_steps {given} contradicts prompts_per_step {args.prompts_per_step}, which "
                f"takes {found} on {processes} process{'es' if processes > 1 else ''}: leave it out"
            )
        if args.steps_per_generation is not None:
            raise BatchMistake(
                "steps_per_generation depends on the number of processes: leave it out beside prompts_per_step, or "
                "say in generation_batch_size how many completions a batch of rollouts has"
            )
        if args.generation_batch_size is not None and args.generation_batch_size % completions:
            raise BatchMistake(
                f"generation_batch_size {args.generation_batch_size} must be a multiple of the {completions} "
                f"completions of a step (prompts_per_step {args.prompts_per_step} x num_generations "
                f"{args.num_generations}): each batch of rollouts feeds whole steps"
            )
    args.gradient_accumulation_steps = found


def as_launched(args: Any, processes: int) -> None:
    """Make of the batch of a configuration that was made in one process what it would be in so many."""
    args.gradient_accumulation_steps = accumulation(args, processes)
    if args.prompts_per_step is None:
        args.generation_batch_size *= processes
    else:
        args.steps_per_generation = args.generation_batch_size // (args.per_device_train_batch_size * processes)


def check_batch(args: Any) -> None:
    """BatchMistake where a settled batch is not what `prompts_per_step` says: a field was assigned, or processes that
    were launched together do not know of one another."""
    if args.prompts_per_step is None:
        return
    wanted = args.prompts_per_step * args.num_generations
    found = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if found != wanted:
        raise BatchMistake(
            f"prompts_per_step {args.prompts_per_step} x num_generations {args.num_generations} = {wanted} "
            f"completions, but per_device_train_batch_size {args.per_device_train_batch_size} x {args.world_size} "
            f"processes x gradient_accumulation_steps {args.gradient_accumulation_steps} = {found}"
        )


def batch_line(args: Any, processes: int) -> str:
    """What a settled batch is, in one line for people."""
    micro, group = args.gradient_accumulation_steps, args.num_generations
    completions = args.per_device_train_batch_size * processes * micro
    rollouts = args.per_device_train_batch_size * processes * args.steps_per_generation
    feeds = rollouts * args.num_iterations / completions
    many = f"a batch of rollouts of {rollouts // group:,} prompts feeds {feeds:g} optimiser steps"
    return (
        f"{completions / group:g} prompts x {group} completions a step = {processes} process"
        f"{'es' if processes > 1 else ''} x {args.per_device_train_batch_size} at a time x {micro} micro-batch"
        f"{'es' if micro > 1 else ''}; {'each step has rollouts of its own' if feeds == 1 else many}"
    )
