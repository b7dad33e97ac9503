"""Peak memory of one training step beside TRL's trainers, at vocabularies of real models.

    python scripts/benchmark_memory.py                                  # the table of recipes/RESULTS.md
    python scripts/benchmark_memory.py --vocabulary 32000 --trainers trl-sdpo sdpo --completion-tokens 256

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_common import end_sometimes, load_tokenizer, machine, make_prompts, words
from benchmark_step import PEERS, Case, make_trainer
from transformers import Qwen3Config, Qwen3ForCausalLM

from srpo.ranges import at_least, ranged
from srpo.scratch_lm import train_tokenizer

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
    how = {"name": name, "folder": folder, "device": args.device, "case": vars(case)}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(args.threads)}
    command = [sys.executable, __file__, "--one", json.dumps(how)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        how = json.loads(args.one)
        print(json.dumps(step(how["name"], Case(**how["case"]), how["folder"], how["device"])))
        return ""
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu: only Linux tells the peak of a part of a process")
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

if __name__ == "__main__":
    main()
