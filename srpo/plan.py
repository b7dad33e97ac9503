"""`srpo plan RECIPE`: what a recipe would do, without doing it.

Reads and checks the recipe and the data that it names; pays nothing, writes nothing, loads no policy.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srpo.cli import Parser
from srpo.ranges import at_least, ranged


def main(argv: Sequence[str] | None = None) -> None:
    """`srpo plan RECIPE [--processes N] [--key value ...]`."""
    parser = Parser(
        description="What a recipe would do: steps, rows, tokens, calls, checkpoints. Nothing is paid or written.",
        epilog="example: srpo plan quickstart/srpo --max_steps 200",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a file, or a shipped name: srpo recipes lists them")
    parser.add_argument("--processes", type=ranged(at_least(1), whole=True), default=1, help="that would train (1)")
    parser.add_argument("--key", metavar="VALUE", help="any key of the recipe, as in srpo train")
    known, rest = parser.parse_known_args(argv)
    print(plan([known.recipe, *rest], known.processes))


def plan(words: Sequence[str], processes: int = 1) -> str:
    """The plan of a command line of `srpo train`, a `name: what` per line."""
    from srpo.config import has_bf16_device
    from srpo.recipe import load_run
    from srpo.run.folder import run_of

    warnings.simplefilter("ignore")  # what training says again
    if not has_bf16_device():  # a recipe for GPUs is planned anywhere
        words = [*words, "--use_cpu", "true", "--bf16", "false", "--fp16", "false"]
    kind, recipe = load_run(words)
    arguments, how, args = recipe
    task = kind(arguments, how, args)
    with tempfile.TemporaryDirectory() as notes:
        task.load(Path(notes))
        rows, said = task.plan() if hasattr(task, "plan") else (None, [])
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    batch = args.per_device_train_batch_size * args.steps_per_generation * processes
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    steps = args.max_steps
    if steps < 0 and rows is not None:
        steps = math.ceil(rows // (batch // args.num_generations) * updates * args.num_train_epochs)
    cap = "no cap" if args.max_cost_usd is None else f"at most ${args.max_cost_usd:g} over all processes"
    folder = Path(args.output_dir)
    there = run_of(folder)
    lines = {
        "task": f"{how.task} ({kind.__module__}.{kind.__qualname__})",
        "policy": how.model_name_or_path + (f", LoRA rank {how.lora_r}" if how.lora_r else ""),
        "training rows": "not counted" if rows is None else f"{rows}",
        "supervised start": _supervised(how),
        "objective": args.objective,
        "steps": _steps(args, steps),
        "a batch of rollouts": f"{batch // args.num_generations} rows x {args.num_generations} completions, "
        f"for {updates:g} optimiser steps",
        "an optimiser step": f"{completions} completions, at most {completions * args.max_completion_length:,} tokens "
        f"written and {completions * how.max_prompt_length:,} read",
        "processes": f"{processes}, {args.per_device_train_batch_size} completions at a time in each",
        "cost": "; ".join([*said, cap]),
        "checkpoints": _checkpoints(args, steps),
        "writes": f"{folder}: policy, router.yaml, start/, evaluation.parquet, report.html, completions",
        "folder": "new" if there is None else "holds a finished run" if there["finished"] else "holds a run",
        "Hub": f"{args.hub_model_id or folder.name}" if args.push_to_hub else "no push",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {what}" for name, what in lines.items())


def _supervised(how: Any) -> str:
    if how.start_from:
        return f"none: RL starts from {how.start_from}"
    if not how.sft_epochs:
        return "none"
    some = f"{how.sft_limit} items" if how.sft_limit else "all training items"
    return f"{how.sft_epochs:g} epochs of {some}, {how.sft_batch_size} rows a step and device"


def _steps(args: Any, steps: int) -> str:
    if args.max_steps > 0:
        return f"{steps} optimiser steps"
    return f"{args.num_train_epochs:g} epochs" + (f", about {steps} optimiser steps" if steps > 0 else "")


def _checkpoints(args: Any, steps: int) -> str:
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return "none; the policy at the end"
    if strategy != "steps":
        return f"every {strategy}"
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * max(steps, 1)))
    count = f": {int(steps // every)}" if steps > 0 else ""
    kept = f", the last {args.save_total_limit} are kept" if args.save_total_limit else ""
    return f"every {every:g} steps{count}{kept}"
