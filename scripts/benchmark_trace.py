"""Which files of the library one training step enters, in order: python scripts/benchmark_trace.py [OBJECTIVE]

A step of a model of a few thousand parameters on a CPU, with rollouts of transformers. Prints the files in the order
in which they are entered first, how often the step moves from one file to another (TRL's trainer counts as one), and
how many files of the library it enters.
"""

import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
from transformers import TrainerCallback

from srpo import SRPOConfig, SRPOTrainer
from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

ROOT = f"{Path(__file__).resolve().parents[1]}/"


class Trace(TrainerCallback):
    """Files entered from the first optimiser step on, until it ends."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """transformers prepares the batch, the rollout, before it calls this: see `watch`."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def watch(self) -> None:
        """From now on."""
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    def _enter(self, frame: FrameType, event: str, _arg: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or frame.f_code.co_name.startswith("<"):
            return
        if file.endswith("trl/trainer/grpo_trainer.py"):
            name = "TRL"
        elif file.startswith(ROOT) and "site-packages" not in file and "benchmark_trace" not in file:
            name = file.removeprefix(ROOT)
        else:
            return
        if not self.files or self.files[-1] != name:
            self.files.append(name)


def traced(objective: str, folder: str, **settings: Any) -> list[str]:
    """The files of one step, moves between them in order; a file may come several times."""
    texts = [f"say {a} and {b}" for a in ("red", "green", "blue") for b in ("cat", "dog", "sun")]
    tokenizer = train_tokenizer(texts, vocab_size=290)
    args = SRPOConfig(
        output_dir=folder,
        objective=objective,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        gradient_checkpointing=False,
        **settings,
    )
    trace = Trace()
    trainer = SRPOTrainer(
        tiny_causal_lm(tokenizer, hidden=32, layers=1, heads=2, intermediate=64, seed=0),
        lambda completions, **_: [float(i % 4 == 0) for i in range(len(completions))],
        args,
        datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts]),
        processing_class=tokenizer,
        callbacks=[trace],
    )
    prepare = trainer._prepare_inputs

    def watched(batch: Any) -> Any:
        trace.watch()
        return prepare(batch)

    trainer._prepare_inputs = watched
    trainer.train()
    return trace.files


def main() -> None:
    """See the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        files = traced(sys.argv[1] if len(sys.argv) > 1 else "srpo", folder)
    own = [name for name in dict.fromkeys(files) if name != "TRL"]
    print("\n".join(own))
    lines = sum(len(Path(ROOT, name).read_text(encoding="utf-8").splitlines()) for name in own)
    print(f"{len(own)} files of {lines:,} lines, {len(files)} moves between files")
    print(" > ".join(Path(name).stem for name in files))


if __name__ == "__main__":
    main()
