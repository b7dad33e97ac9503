"""`srpo plan RECIPE`: what a recipe would do, without doing it.

Reads and checks the recipe and the data that it names; pays nothing, writes nothing, loads no policy. Memory is that
of the model's configuration (`srpo.memory`), at the longest rows that the recipe allows.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.cli import Parser
from srpo.ranges import above, at_least, ranged
from srpo.run.batch import BatchMistake, accumulation, as_launched, batch_line

if TYPE_CHECKING:
    from srpo.memory import How, Shape
    from srpo.task import Planned

MACHINES = (("plain", 1), *((engine, n) for n in (8, 32) for engine in ("ddp", "zero2", "zero3", "fsdp2")))
_NAMES = {"plain": "-", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
_ASKED = 64
"""Tokens of a teacher's prompt beside the question and the demonstration."""


@dataclass
class _Device:
    """What a recipe says of where it runs, whatever this machine is."""

    use_cpu: bool = False
    bf16: bool = True


def main(argv: Sequence[str] | None = None) -> None:
    """`srpo plan RECIPE [--processes N] [--key value ...]`."""
    parser = Parser(
        description="What a recipe would do: steps, rows, tokens, calls, cost, checkpoints, and the memory of each "
        "process on 1, 8 and 32 GPUs. Nothing is paid or written.",
        epilog="example: srpo plan Qwen3-8B/srpo/routing --processes 8",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a file, or a shipped name: srpo recipes lists them")
    parser.add_argument("--processes", type=ranged(at_least(1), whole=True), default=1, help="that would train (1)")
    parser.add_argument("--gpu_gib", type=ranged(above(0)), default=80.0, help="memory of a GPU, in GiB (80)")
    parser.add_argument("--model_config", metavar="PATH", help="config.json of the policy, without the Hub")
    parser.add_argument("--key", metavar="VALUE", help="any key of the recipe, as in srpo train")
    known, rest = parser.parse_known_args(argv)
    print(plan([known.recipe, *rest], known.processes, known.gpu_gib, known.model_config))


def plan(words: Sequence[str], processes: int = 1, gpu_gib: float = 80.0, model_config: str | None = None) -> str:
    """The plan of a command line of `srpo train`, a `name: what` per line, and a table of memory.

    Args:
        gpu_gib: memory of a GPU.
        model_config: config.json of the policy or its folder; None: as the recipe's policy says.
    """
    from srpo.config import has_bf16_device
    from srpo.hub.jobs import repository
    from srpo.recipe import load_recipe, load_run
    from srpo.run.folder import run_of
    from srpo.task import Planned

    warnings.simplefilter("ignore")  # what training says again
    [device] = load_recipe(_Device, words, partial=True, unknown_options=True)
    if not has_bf16_device():  # a recipe for GPUs is planned anywhere
        words = [*words, "--use_cpu", "true", "--bf16", "false", "--fp16", "false"]
    kind, recipe = load_run(words)
    arguments, how, args = recipe
    as_launched(args, processes)
    task = kind(arguments, how, args)
    with tempfile.TemporaryDirectory() as notes:
        task.load(Path(notes))
        planned = task.plan() if hasattr(task, "plan") else Planned(None, [])
        memory = _memory(task, how, args, device, gpu_gib, model_config)
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    batch = args.generation_batch_size
    updates = batch * args.num_iterations / completions
    steps = args.max_steps
    if steps < 0 and planned.rows is not None:
        steps = math.ceil(planned.rows // (batch // args.num_generations) * updates * args.num_train_epochs)
    folder = Path(args.output_dir)
    there = run_of(folder)
    lines = {
        "task": f"{how.task} ({kind.__module__}.{kind.__qualname__})",
        "policy": how.model_name_or_path + (f", LoRA rank {how.lora_r}" if how.lora_r else ""),
        "training rows": "not counted" if planned.rows is None else f"{planned.rows}",
        "supervised start": _supervised(how),
        "objective": args.objective,
        "steps": _steps(args, steps),
        "a batch of rollouts": f"{batch // args.num_generations} rows x {args.num_generations} completions, "
        f"for {updates:g} optimiser steps",
        "an optimiser step": f"{completions} completions, at most {completions * args.max_completion_length:,} tokens "
        f"written and {completions * how.max_prompt_length:,} read",
        "processes": batch_line(args, processes),
        "pool": "; ".join(planned.said),
        "pool calls": _calls(planned, completions, steps * completions / args.num_iterations),
        "cost": _cost(planned, args, steps * completions / args.num_iterations),
        "checkpoints": _checkpoints(args, steps),
        "writes": f"{folder}: policy, router.yaml, start/, evaluation.parquet, report.html, completions",
        "folder": "new" if there is None else "holds a finished run" if there["finished"] else "holds a run",
        "Hub": repository(args) if args.push_to_hub else "no push",
    }
    width = max(map(len, lines))
    return "\n".join([*(f"{name:{width}}  {what}".rstrip() for name, what in lines.items()), "", *memory])


def _calls(planned: Planned, completions: int, episodes: float) -> str:
    if not planned.calls and not planned.calls_beside:
        return "none"
    whole = f", {episodes * planned.calls:,.0f} in training" if episodes > 0 else ""
    beside = f", {planned.calls_beside:,} before and after it" if planned.calls_beside else ""
    return f"at most {planned.calls} an episode, {completions * planned.calls:,} a step{whole}{beside}"


def _cost(planned: Planned, args: Any, episodes: float) -> str:
    cap = "no cap" if args.max_cost_usd is None else f"max_cost_usd stops at ${args.max_cost_usd:g}"
    if planned.usd_most is None or episodes <= 0:
        known = "nothing" if not planned.calls and not planned.calls_beside else "not known beforehand"
        return f"{known}; {cap}"
    most = f"at most ${episodes * planned.usd_most + planned.usd_beside:,.2f}"
    if planned.usd_expected is not None:
        most = f"expected ${episodes * planned.usd_expected:,.2f} ({planned.expected_if}), {most}"
    return f"{most}; {cap}" if planned.paid else f"nothing is paid; asked live, the training would cost {most}"


def _memory(task: Any, how: Any, args: Any, device: _Device, gpu_gib: float, given: str | None) -> Iterator[str]:
    """Lines about the memory of a process."""
    from srpo.memory import GIB, plan_memory, trained

    try:
        shape = _shape(task, how, args, given)
    except (OSError, ValueError) as why:
        yield f"memory: not known: {' '.join(str(why).split())}"
        return
    base = memory_settings(args, how, shape, device.use_cpu, device.bf16, gpu_gib * GIB)
    weights = f"{shape.weights / 1e6:,.1f} million weights"
    weights += f", of which {trained(shape, how.lora_r) / 1e6:,.1f} million train" if how.lora_r else ""
    where = "on a CPU" if device.use_cpu else f"on GPUs of {gpu_gib:g} GiB"
    rows = f"rows of {base.prompt:,} + {base.completion:,} tokens, {base.rows} at a time"
    yield f"memory of a process in GiB, {where}: {weights}; {rows}"
    table: list[tuple[str, ...]] = [_HEADER]
    for engine, processes in MACHINES[: 1 if device.use_cpu else None]:
        row = (str(processes), _NAMES[engine])
        try:
            micro = accumulation(args, processes)
            rollouts = args.generation_batch_size
            rollouts //= processes if args.prompts_per_step is not None else 1
            on = replace(base, engine=engine, processes=processes, rollouts=rollouts, accumulates=micro > 1)
            found = plan_memory(shape, on)
            plain = plan_memory(shape, replace(on, shared=False)).activations
        except (BatchMistake, ValueError) as why:
            table.append((*row, str(why)))
            continue
        resting = (found.weights, found.gradients, found.optimiser, found.teacher + found.reference)
        work = (found.engine, found.activations, plain, found.kept, found.generation, found.vllm)
        fits = "" if device.use_cpu else "yes" if found.total <= gpu_gib * GIB else "no"
        table.append((*row, *(f"{part / GIB:.1f}" for part in (*resting, *work, found.total)), fits))
    yield from _aligned(table)
    weights_of_vllm = 2 * shape.weights / args.vllm_tensor_parallel_size
    if 0 < base.vllm < weights_of_vllm:
        yield (
            f"vLLM: its {base.vllm / GIB:.1f} GiB do not hold the {weights_of_vllm / GIB:.1f} GiB of weights: raise "
            "vllm_gpu_memory_utilization or vllm_tensor_parallel_size"
        )
    if base.replays:
        host = plan_memory(shape, replace(base, rollouts=args.generation_batch_size)).replay_host
        host_text = "of expert ids for a batch of rollouts, over all machines and on no GPU"
        yield f"replay table: {host / GIB:.2f} GiB {host_text}"
    yield "formulas: srpo/memory.py, compared with peaks on a CPU and not with a GPU"
    if device.use_cpu:
        yield (
            "Python and its libraries take 0.6 GiB besides; glibc keeps what is freed, up to 75 % more, without "
            "MALLOC_MMAP_THRESHOLD_=65536 in the environment"
        )


_HEADER = (
    *("GPUs", "engine", "weights", "gradients", "optimiser", "teacher", "engine's"),
    *("activations", "(no shared prefix)", "states", "sampling", "vLLM", "peak", "fits"),
)


def _aligned(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    whole = [row for row in table if len(row) == len(_HEADER)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(_HEADER))]
    for row in table:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()


def memory_settings(args: Any, how: Any, shape: Shape, cpu: bool, bf16: bool, gpu: float) -> How:
    """What of a run decides about its memory, in one process.

    Args:
        args: an `SRPOConfig`.
        how: the `RunArguments`.
        cpu, bf16: where it will run, whatever this machine is.
        gpu: bytes of a GPU.
    """
    from srpo.memory import How
    from srpo.objectives import objective_of
    from srpo.replay.settings import replay_mode

    prompt, completion = how.max_prompt_length, args.max_completion_length
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    bf16 = bf16 and not cpu
    return How(
        rows=args.per_device_train_batch_size,
        group=args.num_generations,
        prompt=prompt,
        completion=completion,
        rollouts=args.per_device_train_batch_size * args.steps_per_generation,
        accumulates=args.gradient_accumulation_steps > 1,
        bf16=bf16,
        checkpointing=args.gradient_checkpointing,
        lora=how.lora_r,
        low_base=bool(how.lora_r) and (bf16 or how.model_name_or_path == "smollm2"),
        shared=args.shared_prefix != "off",
        teacher=args.teacher_model_kind if objective_of(args).distils(args) else None,
        teacher_prompt=min(args.max_reprompt_len, prompt + completion + _ASKED),
        teacher_states=args.distillation_mode != "sampled_token",
        reference=args.beta > 0,
        generates=not args.use_vllm,
        device="cpu" if cpu else "cuda",
        vllm=args.vllm_gpu_memory_utilization * gpu if colocated else 0.0,
        vllm_sleeps=colocated and args.vllm_enable_sleep_mode,
        replays=bool(shape.routers) and replay_mode(args) != "off",
    )


def _shape(task: Any, how: Any, args: Any, given: str | None) -> Shape:
    """Sizes of the policy.

    Raises:
        OSError, ValueError: why they are not known, in one sentence.
    """
    from transformers import AutoConfig

    from srpo.memory import shape_of
    from srpo.policy import TINY, shipped_policy

    name = how.start_from or how.model_name_or_path
    if given is not None:
        return shape_of(AutoConfig.from_pretrained(given))
    if getattr(task, "own_policy", lambda _: None)(name) is not None:
        raise ValueError(f"{name} is no language model")
    if name in TINY:
        from srpo.policy import load_policy

        return shape_of(load_policy(name, args, how.lora_r, task.corpus)[0].config)
    if (shipped := shipped_policy(name)) is not None:
        [file] = [path for path in shipped.made_of() if path.suffix == ".gguf"]
        return shape_of(AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    try:
        return shape_of(AutoConfig.from_pretrained(name))
    except (OSError, ValueError):
        raise OSError(
            f"{name} is neither a folder of a policy nor in the Hub's cache here, and the Hub does not give it: say "
            "--model_config with its config.json"
        ) from None


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
