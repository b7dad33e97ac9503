"""Which files of the library one training step enters, in order: python scripts/benchmark_trace.py [RECIPE]

The step is the first of a shipped recipe (quickstart/srpo, quickstart/think_route, quickstart/bopo ...), made small,
without its supervised start: rollout, rewards, credit, teacher, loss, backward. Prints the files in the order in which
they are entered first, how many there are, and how often the step moves from one to another (TRL's trainer counts as
one).
"""

import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from srpo import train

ROOT = f"{Path(__file__).resolve().parents[1]}/"
SMALL = """--max_steps 1 --train_limit 16 --heldout_limit 2 --num_generations 4 --per_device_train_batch_size 8
    --gradient_accumulation_steps 1 --use_cpu true --disable_tqdm true --report_to none --log_completions false"""
SMALLER = {"think_route": "--sft_epochs 0 --max_turns 2", "query_routing": "--sft_epochs 0"}
"""Per task, beside `SMALL`. Step routing profiles its tasks with its own small numbers."""
SMALL_STEPS = "--sft_epochs 0.1 --sft_sweep 1 --profile_runs 1 --step_limit 4 --train_caps inf --heldout_caps inf"


class Trace(TrainerCallback):
    """Files entered between begin and end of the first step, moves between them in order."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _enter(self, frame: FrameType, event: str, _arg: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or frame.f_code.co_name.startswith("<"):
            return
        if file.endswith("trl/trainer/grpo_trainer.py"):
            name = "TRL"
        elif file.startswith(ROOT) and "site-packages" not in file and not file.endswith("benchmark_trace.py"):
            name = file.removeprefix(ROOT)
        else:
            return
        if not self.files or self.files[-1] != name:
            self.files.append(name)


def traced(recipe: str, folder: str) -> list[str]:
    """The files of one step of a recipe, moves between them in order; a file may come several times."""
    trace, trainer = Trace(), train.SRPOTrainer

    class Traced(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(trace)

    task = train.load_run([recipe, "--output_dir", folder])[1][1].task
    train.SRPOTrainer = Traced  # type: ignore[misc]
    try:
        small = f"{SMALL} {SMALLER.get(task, SMALL_STEPS)}".split()
        train.main([recipe, "--output_dir", folder, "--overwrite", "true", *small])
    finally:
        train.SRPOTrainer = trainer  # type: ignore[misc]
    return trace.files


def main() -> None:
    """See the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        files = traced(sys.argv[1] if len(sys.argv) > 1 else "quickstart/srpo", folder)
    own = [name for name in dict.fromkeys(files) if name != "TRL"]
    print("\n".join(own))
    lines = sum(len(Path(ROOT, name).read_text(encoding="utf-8").splitlines()) for name in own)
    print(f"{len(own)} files of {lines:,} lines, {len(files)} moves between files")
    print(" > ".join(Path(name).stem for name in files[:400]))


if __name__ == "__main__":
    main()
