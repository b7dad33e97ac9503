"""A run that is told to end saves a whole checkpoint, ends with 0, and goes on bitwise: real processes and signals."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from core_helpers import config, dataset, equal, model, trainer, weights
from resume_cases import reward
from transformers import TrainerCallback

from srpo.run.whole import newest

STEPS = 6


def made(folder: Path, seconds: float = 0.0, **changes: Any) -> Any:
    settings: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": STEPS, **changes}
    args = config(folder, objective="srpo", steps_per_generation=2, per_device_train_batch_size=8, **settings)

    def slow(completion_ids: Any, **_: Any) -> list[float]:
        time.sleep(seconds)
        return reward(completion_ids)

    return trainer(args, model(), rewards=slow, rollout_func=None, train_dataset=dataset(24))


class Told(TrainerCallback):
    """Sends signals to its own process when a step begins."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            for i, number in enumerate(self.numbers):
                time.sleep(0.8 * i)
                os.kill(os.getpid(), number)


def ended(folder: Path, told: Told, child: list[str] | None = None, **options: Any) -> tuple[int, float]:
    """Exit code of a fork that trains, and its seconds."""
    began, fork = time.monotonic(), os.fork()
    if fork == 0:
        code = 99
        try:
            run = made(folder, **options)
            run.add_callback(told)
            if child:
                (folder / "child").write_text(str(subprocess.Popen(child).pid))
            run.train()
        except SystemExit as asked:
            code = int(asked.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_step_is_finished_saved_and_gone_on_from(tmp_path: Path, number: int) -> None:
    at = 2 + int(number) % 3  # inside and at the end of a generation batch
    code, _ = ended(tmp_path / "told", Told(at, number), ["sleep", "600"])
    assert code == 0
    assert newest(tmp_path / "told") == tmp_path / "told" / f"checkpoint-{at}"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "told" / "child").read_text()), 0)
    whole = made(tmp_path / "whole")
    whole.train()
    rest = made(tmp_path / "told")
    rest.train(resume_from_checkpoint="auto")
    assert equal(weights(rest.model), weights(whole.model)) and rest.state.global_step == STEPS


def test_a_second_interrupt_and_a_passed_deadline_end_at_once(tmp_path: Path) -> None:
    code, seconds = ended(tmp_path / "twice", Told(1, signal.SIGINT, signal.SIGINT), seconds=300.0)
    assert code == 130 and seconds < 60
    code, seconds = ended(tmp_path / "late", Told(1, signal.SIGTERM), seconds=300.0, signal_deadline=1.0)
    assert code == 1 and seconds < 60 and newest(tmp_path / "late") is None
