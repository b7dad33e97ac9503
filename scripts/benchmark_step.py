"""Training steps beside TRL's own trainers: same model, prompts, sampling, rewards, batch and loss, in one process.

    python scripts/benchmark_step.py --table                                       # the table of recipes/RESULTS.md
    python scripts/benchmark_step.py --model tiny moe --prompt-tokens 100 400 --completion-tokens 48 --group 4 8
    python scripts/benchmark_step.py --model smollm2 --trainers trl-grpo grpo --steps 2 --repeats 1
    python scripts/benchmark_step.py --model outputs/quickstart/router/start --set shared_prefix=off

Trainers take turns, so that a slow moment of the machine hits all of them. The table gives medians over the steps of
all turns but the first of each, in three parts: generation; scoring (rewards, old log-probs, and our teacher, which
TRL's SDPOTrainer runs in its loss); and the optimiser's side (loss forward, backward, update). `x TRL` says how many
times faster than TRL's GRPOTrainer, or for SDPO than TRL's SDPOTrainer: of all that is not generation, and of the
whole step. `limit` is what sharing every common beginning of rows can give at most, from the tokens of that very run.

On a CPU the seconds are those that the process computed, with one thread unless told otherwise: other work on the
machine lengthens them little, unlike those of a clock. On a GPU they are of the clock.
"""

import argparse
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_common import MODELS, Ids, Watch, load_tokenizer, machine, make_model, make_prompts, median, token_limit
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.experimental.sdpo import SDPOConfig
from trl.experimental.sdpo import SDPOTrainer as TRLSDPOTrainer

from srpo import SRPOConfig, SRPOTrainer
from srpo.ranges import at_least, ranged

# TRL's SDPO with the settings that are the defaults here; it always runs its teacher on every row.
TRL_SDPO = {
    "distillation_mode": "topk_logits",
    "distillation_topk": 100,
    "distillation_add_tail": True,
    "distillation_alpha": 0.5,
    "success_reward_threshold": 0.5,
    "distillation_weight": 1.0,
}
PEERS = {"trl-grpo": "trl-grpo", "grpo": "trl-grpo", "srpo": "trl-grpo", "trl-sdpo": "trl-sdpo", "sdpo": "trl-sdpo"}
"""Trainer -> the one of TRL's that it is compared with."""


def right_in_ten(number: int) -> Callable[..., list[float]]:
    """A reward: 1 for so many in ten pairs of prompt and completion, by a checksum of the text."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [float(zlib.crc32(f"{p}{c}".encode()) % 10 < number) for p, c in pairs]

    return reward


reward = right_in_ten(8)


@dataclass(frozen=True)
class Case:
    """One block of rows of the table."""

    model: str
    prompt: int
    completion: int
    group: int
    rows: int = 32
    """Of one step."""
    micro: int = 16
    """Rows of a micro-batch; whole groups."""
    steps: int = 3
    """Of every turn."""
    turns: int = 2
    """Of every trainer."""


TABLE = (
    Case("tiny", 400, 48, 8),
    Case("moe", 400, 48, 8),
    Case("tiny", 32, 256, 2),
    Case("smollm2", 400, 48, 8, rows=8, micro=8, steps=2, turns=1),
)


@dataclass
class Measured:
    """Of one trainer, over its turns; seconds of steps."""

    generation: list[float] = field(default_factory=list)
    scoring: list[float] = field(default_factory=list)
    optimiser: list[float] = field(default_factory=list)
    prompts: list[Ids] = field(default_factory=list)
    completions: list[Ids] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    distilled: float | None = None

    @property
    def whole(self) -> list[float]:
        return [sum(parts) for parts in zip(self.generation, self.scoring, self.optimiser, strict=True)]

    @property
    def trained(self) -> list[float]:
        return [sum(parts) for parts in zip(self.scoring, self.optimiser, strict=True)]


class Steps(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.start = watch, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.watch.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.parts.setdefault("whole", []).append(self.watch.now() - self.start)


def make_trainer(
    name: str, case: Case, folder: str, data: Dataset, output: str, steps: int, device: str, ours: dict[str, Any]
) -> Any:
    """A trainer of this name (of `PEERS`) with nothing but its objective different from the others."""
    common: dict[str, Any] = {
        "output_dir": output,
        "max_steps": steps,
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "gradient_checkpointing": False,
        "num_generations": case.group,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.rows // case.micro,
        "max_completion_length": case.completion * 3 // 2,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = load_tokenizer(folder)
    if name == "trl-grpo":
        config = GRPOConfig(**common, scale_rewards="none")
        return TRLGRPOTrainer(model, reward, config, data, processing_class=tokens)
    if name == "trl-sdpo":
        return TRLSDPOTrainer(model, reward, SDPOConfig(**common, **TRL_SDPO), data, processing_class=tokens)
    settings = SRPOConfig(**common, **ours, objective=name, log_completions=False)
    return SRPOTrainer(model, reward, settings, data, processing_class=tokens)


def take_turn(measured: Measured, trainer: Any, device: str, wall: bool, warmup: int) -> None:
    """Train, and add what the steps behind the first ``warmup`` took."""
    watch = Watch(device, wall)

    def generated(output: Any) -> None:
        prompts, completions = ([list(ids) for ids in part] for part in output[:2])
        measured.prompts += prompts
        measured.completions += completions
        measured.limits.append(token_limit(prompts, completions))

    prepare = next(
        name for name in ("_generate_and_score_completions", "_prepare_training_batch") if hasattr(trainer, name)
    )
    watch.wrap(trainer, "_generate", "generation", generated)
    watch.wrap(trainer, prepare, "prepared")
    trainer.add_callback(Steps(watch))
    trainer.train()
    parts = watch.parts
    for whole, prepared, generation in list(zip(parts["whole"], parts["prepared"], parts["generation"], strict=True))[
        warmup:
    ]:
        measured.generation.append(generation)
        measured.scoring.append(prepared - generation)
        measured.optimiser.append(whole - prepared)
    share = trainer.state.log_history[-1].get("srpo/distilled_share") if trainer.state.log_history else None
    measured.distilled = measured.distilled if share is None else share


def measure(case: Case, args: argparse.Namespace) -> dict[str, Measured]:
    """All trainers of the command line on one case, in turns."""
    found = {name: Measured() for name in args.trainers}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(case.model, folder, case.completion)
        data = make_prompts(load_tokenizer(model), 64, case.prompt, args.common_tokens)
        for turn in range(case.turns):
            for name, measured in found.items():
                output = str(Path(folder, name))
                trainer = make_trainer(
                    name, case, model, data, output, case.steps, args.device, dict(args.set) if name in OURS else {}
                )
                take_turn(measured, trainer, args.device, args.clock == "wall", args.warmup)
                print(f"turn {turn + 1}: {case.model} {name} {measured.whole[-1]:.2f} s a step", flush=True)
    return found


OURS = ("grpo", "srpo", "sdpo")
COLUMNS = "model | P / C / G | trainer | generation s | scoring s | optimiser s | whole s | limit".split(" | ")
RATIOS = ["trained x TRL", "whole x TRL", "distilled"]


def numbers(case: Case, found: dict[str, Measured]) -> list[dict[str, Any]]:
    """One record per trainer: medians of seconds, times faster than its peer, tokens."""
    records = []
    for name, one in found.items():
        record: dict[str, Any] = {"model": case.model, "trainer": name, "group": case.group}
        record |= {"prompt": sum(map(len, one.prompts)) / len(one.prompts)}
        record |= {"completion": sum(map(len, one.completions)) / len(one.completions)}
        parts = {"generation": one.generation, "scoring": one.scoring, "optimiser": one.optimiser, "whole": one.whole}
        record |= {part: median(seconds) for part, seconds in parts.items()}
        record |= {"limit": median(one.limits), "distilled": one.distilled}
        peer = found.get(PEERS[name])
        if peer is not None:
            record["trained_ratio"] = median(peer.trained) / median(one.trained)
            record["whole_ratio"] = median(peer.whole) / median(one.whole)
        records.append(record)
    return records


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    shape = f"{record['prompt']:.0f} / {record['completion']:.0f} / {record['group']}"
    parts = [f"{record[name]:.2f}" for name in ("generation", "scoring", "optimiser", "whole", "limit")]
    ratios = [f"{record[name]:.2f}" if name in record else "" for name in ("trained_ratio", "whole_ratio")]
    distilled = "" if record["distilled"] is None else f"{record['distilled']:.0%}"
    return "| " + " | ".join([record["model"], shape, record["trainer"], *parts, *ratios, distilled]) + " |"


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE of a setting of ours."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    numbers = {"true": True, "false": False}
    try:
        return name, numbers[value] if value in numbers else float(value) if "." in value else int(value)
    except ValueError:
        return name, value


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = ranged(at_least(1), whole=True)
    parser.add_argument("--table", action="store_true", help="the cases of recipes/RESULTS.md, instead of a grid")
    parser.add_argument("--model", nargs="+", default=["tiny"], help=f"{', '.join(MODELS)}, or folders")
    parser.add_argument("--prompt-tokens", type=number, nargs="+", default=[400], metavar="P")
    parser.add_argument("--completion-tokens", type=number, nargs="+", default=[48], metavar="C", help="in the mean")
    parser.add_argument("--group", type=ranged(at_least(2), whole=True), nargs="+", default=[8], metavar="G")
    parser.add_argument(
        "--common-tokens", type=ranged(at_least(0), whole=True), default=0, help="that all prompts begin with"
    )
    parser.add_argument("--rows", type=number, default=32, help="completions of a step")
    parser.add_argument("--micro-batch", type=number, default=16, help="rows of a micro-batch")
    parser.add_argument("--trainers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help="settings of ours")
    parser.add_argument("--steps", type=number, default=3, help="of every turn")
    parser.add_argument("--warmup", type=number, default=1, help="of these, not counted")
    parser.add_argument("--repeats", type=number, default=2, help="turns of every trainer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="seconds on a CPU")
    parser.add_argument("--threads", type=number, default=1, help="of torch, on a CPU")
    args = parser.parse_args(argv)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup}: nothing is left of --steps {args.steps}")
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    grid = [
        Case(model, prompt, completion, group, args.rows, args.micro_batch, args.steps, args.repeats)
        for model in args.model
        for prompt in args.prompt_tokens
        for completion in args.completion_tokens
        for group in args.group
    ]
    for case in grid:
        if case.micro % case.group or case.rows % case.micro:
            parser.error(
                f"--rows {case.rows} must be whole micro-batches of {case.micro}, of whole groups of {case.group}"
            )
    header = [*COLUMNS, *RATIOS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for case in TABLE if args.table else grid:
        lines += map(line, numbers(case, measure(case, args)))
        print("\n".join(lines), flush=True)
    print(machine(args.device))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
