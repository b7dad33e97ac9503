"""Peak memory of one training step beside TRL's trainers, at vocabularies of real models.

    python scripts/benchmark_memory.py                                  # the table of recipes/RESULTS.md
    python scripts/benchmark_memory.py --vocabulary 32000 --trainers trl-sdpo sdpo --completion-tokens 256
    python scripts/benchmark_memory.py --plan                           # `srpo plan` beside what is measured

One step of one micro-batch by each trainer, in a process of its own: a Qwen3 of two layers and 64 numbers a token, so
that logits are all that counts. `loss MiB` is what the loss and its gradient take at most above what is there before
(TRL's SDPO runs its teacher in there, ours before); `step MiB` is the same for the whole step, with sampling, rewards
and the teacher. On Linux the kernel counts the peak of resident memory, on a GPU torch counts what it has allocated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available
from benchmark_common import end_sometimes, load_tokenizer, machine, make_prompts, words
from benchmark_common import make_model as make_any_model
from benchmark_step import PEERS, Case, make_trainer, reward
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from srpo import SRPOConfig, SRPOTrainer
from srpo.memory import plan_memory, shape_of
from srpo.plan import memory_settings
from srpo.ranges import at_least, ranged
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer
from srpo.task import RunArguments

MIB = 2**20


def make_model(folder: str, vocabulary: int, ends_after: int) -> str:
    """Folder of a tiny model with a large vocabulary, of which a small tokenizer uses the first ids."""
    tokenizer = train_tokenizer([" ".join(words(seed)) for seed in range(3)], vocab_size=4096)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    end_sometimes(model, len(tokenizer), tokenizer.eos_token_id, ends_after)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Peak:
    """Most memory since `reset`, above what was there then, in MiB."""

    def __init__(self, device: str) -> None:
        self.cuda, self._before = device == "cuda", 0.0

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
        self._before = self._read("VmRSS")

    def read(self) -> float:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> float:
        if self.cuda:
            return (torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()) / MIB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def step(name: str, case: Case, folder: str, device: str) -> dict[str, float]:
    """Peaks of one step of a trainer of this name; for a process of its own."""
    data = make_prompts(load_tokenizer(folder), 1, case.prompt)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(name, case, folder, data, output, 1, device, {})
        whole, part, found = Peak(device), Peak(device), {"before": 0.0}
        loss, training_step = trainer.compute_loss, trainer.training_step

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            found["before"] = whole.read()
            part.reset()
            return loss(*args, **kwargs)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            whole.reset()
            result = training_step(*args, **kwargs)
            found["loss"] = part.read()
            found["step"] = max(found["before"], whole.read())
            return result

        trainer.compute_loss, trainer.training_step = compute_loss, stepped
        trainer.train()
    return found


def apart(name: str, case: Case, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """`step` in a process of its own, in which what is freed goes back to the system at once."""
    return in_process({"name": name, "folder": folder, "device": args.device, "case": vars(case)}, args.threads)


def in_process(how: dict[str, Any], threads: int) -> dict[str, float]:
    """What `--one` prints."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--one", json.dumps(how)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{how}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line(vocabulary: int, name: str, found: dict[str, dict[str, float]]) -> str:
    """A row of the table; ratios to TRL's GRPO and SDPO in the same run."""
    own = found[name]
    cells = [f"{own[part]:.0f}" for part in ("loss", "step")]
    for peer in ("trl-grpo", "trl-sdpo"):
        cells += [f"{own[part] / found[peer][part]:.2f}" if peer in found else "" for part in ("loss", "step")]
    return "| " + " | ".join([str(vocabulary), name, *cells]) + " |"


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = ranged(at_least(1), whole=True)
    parser.add_argument("--vocabulary", type=ranged(at_least(4096), whole=True), nargs="+", default=[32000, 151936])
    parser.add_argument("--prompt-tokens", type=number, default=400, metavar="P")
    parser.add_argument("--completion-tokens", type=number, default=48, metavar="C", help="in the mean")
    parser.add_argument("--group", type=ranged(at_least(2), whole=True), default=8, help="rows of the micro-batch")
    parser.add_argument("--trainers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=number, default=1, help="of torch, on a CPU")
    parser.add_argument("--plan", nargs="*", choices=list(PLANNED), help="compare `srpo plan`; these cases, or all")
    parser.add_argument("--smollm2", metavar="FOLDER", help="where it is converted already; for --plan")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        how = json.loads(args.one)
        if "plan" in how:
            print(json.dumps(measured_peak(PLANNED[how["plan"]], how["folder"])))
            return ""
        print(json.dumps(step(how["name"], Case(**how["case"]), how["folder"], how["device"])))
        return ""
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu: only Linux tells the peak of a part of a process")
    if args.plan is not None:
        models = {"smollm2": args.smollm2} if args.smollm2 else {}
        rows = ["| training | planned MiB | measured MiB | planned / measured |", "|---|---|---|---|"]
        for name, one in compare(args.plan or PLANNED, models, args.threads):
            ratio = one["planned"] / one["measured"]
            rows.append(f"| {name} | {one['planned']:.0f} | {one['measured']:.0f} | {ratio:.2f} |")
            print(rows[-1], flush=True)
        print("\n".join(rows))
        print(machine("cpu"))
        return "\n".join(rows)
    case = Case("", args.prompt_tokens, args.completion_tokens, args.group, rows=args.group, micro=args.group)
    header = ["V", "trainer", "loss MiB", "step MiB", *(f"{p} / TRL {t}" for t in ("GRPO", "SDPO") for p in PARTS)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for vocabulary in args.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, vocabulary, args.completion_tokens)
            found: dict[str, dict[str, float]] = {}
            for name in args.trainers:
                found[name] = apart(name, case, folder, args)
                print(f"{vocabulary} {name}: {found[name]}", flush=True)
        lines += [line(vocabulary, name, found) for name in args.trainers]
    print("\n".join(lines))
    print(machine(args.device))
    return "\n".join(lines)


PARTS = ("loss", "step")


# --------------------------------------------------------------------------------------- planned beside measured


@dataclass(frozen=True)
class Planned:
    """A training whose peak is planned and measured: two steps of two micro-batches, on a CPU, in fp32."""

    model: str
    """own: the quickstart's policy made from nothing; smollm2, or a folder that holds it."""
    settings: dict[str, Any]
    rows: int = 32
    """Of a micro-batch."""
    prompt: int = 200
    completion: int = 96
    lora: int = 0


PLANNED = {
    "own, GRPO": Planned("own", {"objective": "grpo", "shared_prefix": "off"}),
    "own, GRPO, shared prefix": Planned("own", {"objective": "grpo", "shared_prefix": "on"}),
    "own, GRPO, checkpointing": Planned(
        "own", {"objective": "grpo", "shared_prefix": "off", "gradient_checkpointing": True}
    ),
    "own, SDPO": Planned("own", {"objective": "sdpo", "shared_prefix": "off"}),
    "smollm2, GRPO": Planned("smollm2", {"objective": "grpo", "shared_prefix": "off"}, rows=8, completion=24),
    "smollm2, SDPO, checkpointing": Planned(
        "smollm2",
        {"objective": "sdpo", "shared_prefix": "off", "gradient_checkpointing": True},
        rows=8,
        completion=24,
    ),
    "smollm2, GRPO, LoRA": Planned(
        "smollm2", {"objective": "grpo", "shared_prefix": "off"}, rows=8, completion=24, lora=16
    ),
}
GROUP = 8


def planned_model(name: str, folder: str) -> str:
    """Folder of a model of `PLANNED`."""
    if name != "own":
        return make_any_model(name, folder, 24)
    tokenizer = train_tokenizer([" ".join(words(seed)) for seed in range(3)], vocab_size=4096)
    model = tiny_causal_lm(tokenizer)
    place = Path(folder, "own")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def measured_peak(case: Planned, folder: str) -> dict[str, float]:
    """Planned and measured peak above what is there before the model, in MiB; for a process of its own."""
    data = make_prompts(load_tokenizer(folder), 16, case.prompt)
    if is_deepspeed_available():
        import_module("deepspeed")  # TRL's trainers do: a library of the process, not memory of a training
    peak = Peak("cpu")
    peak.reset()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if case.lora:
        how = LoraConfig(r=case.lora, lora_alpha=2 * case.lora, target_modules="all-linear")
        model = get_peft_model(model, how)
    with tempfile.TemporaryDirectory() as output:
        args = SRPOConfig(
            **{"gradient_checkpointing": False, **case.settings},
            output_dir=output,
            max_steps=2,
            use_cpu=True,
            bf16=False,
            num_generations=GROUP,
            prompts_per_step=2 * case.rows // GROUP,
            per_device_train_batch_size=case.rows,
            max_completion_length=case.completion,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            log_completions=False,
        )
        trainer = SRPOTrainer(model, reward, args, data, processing_class=load_tokenizer(folder))
        loss, widths = trainer.compute_loss, [0, 0]

        def compute_loss(model: Any, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Any:
            for i, name in enumerate(("prompt_ids", "completion_ids")):
                widths[i] = max(widths[i], inputs[name].size(1))
            return loss(model, inputs, *rest, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.train()
        found = peak.read()
        shape = shape_of(AutoConfig.from_pretrained(folder))
        run = RunArguments("query_routing", folder, lora_r=case.lora, max_prompt_length=widths[0])
        args.max_completion_length = widths[1]
        settings = memory_settings(args, run, shape, cpu=True, bf16=False, gpu=0.0)
    return {"planned": plan_memory(shape, settings).total / MIB, "measured": found}


def compare(names: Iterable[str], models: Mapping[str, str], threads: int) -> Iterator[tuple[str, dict[str, float]]]:
    """`measured_peak` of cases of `PLANNED`, each in a process of its own.

    Args:
        models: folders of models that are there already, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = dict(models)
        for name in names:
            kind = PLANNED[name].model
            if kind not in made:
                made[kind] = planned_model(kind, folder)
            yield name, in_process({"plan": name, "folder": made[kind]}, threads)


if __name__ == "__main__":
    main()
