"""A run that is told to end saves a whole checkpoint, ends with 0, and goes on bitwise: real processes and signals."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from core_helpers import config, dataset, equal, model, trainer, weights
from resume_cases import reward
from transformers import TrainerCallback

from srpo.run import whole
from srpo.run.signals import heeded
from srpo.run.whole import fault, newest, whole_looking
from srpo.trainer import checkpoint

STEPS = 6


def made(folder: Path, seconds: float = 0.0, **changes: Any) -> Any:
    settings: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": STEPS}
    settings |= {"objective": "srpo", "steps_per_generation": 2, "per_device_train_batch_size": 8, **changes}
    args = config(folder, **settings)

    def slow(completion_ids: Any, **_: Any) -> list[float]:
        time.sleep(seconds)
        return reward(completion_ids)

    better = itertools.count()  # so that no earlier checkpoint is the best
    heldout = {"heldout": lambda: {"reward": next(better)}} if args.eval_strategy != "no" else {}
    return trainer(args, model(), rewards=slow, rollout_func=None, train_dataset=dataset(24), **heldout)


def tell(numbers: tuple[int, ...]) -> None:
    """Send signals to this process."""
    for i, number in enumerate(numbers):
        time.sleep(0.8 * i)
        os.kill(os.getpid(), number)


class Told(TrainerCallback):
    """Sends signals to its own process when a step begins."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def __call__(self, run: Any) -> None:
        run.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            tell(self.numbers)


def ended(
    folder: Path, told: Callable[[Any], object], child: list[str] | None = None, **options: Any
) -> tuple[int, float]:
    """Exit code of a fork that trains, and its seconds."""
    began, fork = time.monotonic(), os.fork()
    if fork == 0:
        code = 99
        try:
            with heeded():
                run = made(folder, **options)
                if child:
                    (folder / "child").write_text(str(subprocess.Popen(child).pid))
                told(run)
                run.train()
            code = 98  # no signal has ended it
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_every_process_is_told_ends_no_data_loader_before_its_time(tmp_path: Path, number: int) -> None:
    class Everyone(Told):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == self.step:
                workers = psutil.Process().children()
                assert workers
                for one in (*workers, psutil.Process()):
                    one.send_signal(self.numbers[0])
                time.sleep(2)

    code, _ = ended(tmp_path, Everyone(2, number), dataloader_num_workers=1)
    assert code == 0 and newest(tmp_path) == tmp_path / "checkpoint-2"


def test_a_second_interrupt_and_a_passed_deadline_end_at_once(tmp_path: Path) -> None:
    code, seconds = ended(tmp_path / "twice", Told(1, signal.SIGINT, signal.SIGINT), seconds=300.0)
    assert code == 130 and seconds < 60
    code, seconds = ended(tmp_path / "late", Told(1, signal.SIGTERM), seconds=300.0, signal_deadline=1.0)
    assert code == 1 and seconds < 60 and newest(tmp_path / "late") is None


IN_A_STEP = ("rollout", "reward", "loss", "gradient")
PLACES = (*IN_A_STEP, "log", "evaluation", "weights", "state", "seal", "name", "rotation", "push")


class Inside:
    """Sends signals from the middle of something of the second step; `nap`: and then stays there for so long."""

    def __init__(self, place: str, *numbers: int, nap: float = 0.0) -> None:
        self.place, self.numbers, self.nap = place, numbers, nap

    def __call__(self, run: Any) -> None:
        run._push_from_checkpoint = lambda folder: Path(run.args.output_dir, "pushed").write_text(folder)
        run.args.push_to_hub = True
        owner, name = {
            "rollout": (run, "_generate"), "reward": (run, "_calculate_rewards"), "loss": (run, "_compute_loss"),
            "gradient": (run, "_get_grad_norm"), "log": (run, "log"), "evaluation": (run, "evaluate"),
            "weights": (run, "save_model"), "state": (run.checkpoints, "save"), "seal": (whole, "_flushed"),
            "name": (checkpoint, "put_in_place"), "rotation": (whole, "_take_away"),
            "push": (run, "_push_from_checkpoint"),
        }[self.place]  # fmt: skip
        inner, due = getattr(owner, name), [True]

        def outer(*args: Any, **kwargs: Any) -> Any:
            unfinished = self.place == "push" and not (Path(args[0]) / whole.MANIFEST).is_file()  # transformers' call
            if due and not unfinished and run.state.global_step == (1 if self.place in IN_A_STEP else 2):
                due.clear()
                tell(self.numbers)
                time.sleep(self.nap)
            return inner(*args, **kwargs)

        setattr(owner, name, outer)


TWICE = (signal.SIGINT, signal.SIGINT)
MOMENTS = [
    *((place, (signal.SIGTERM,)) for place in PLACES),
    *((place, (signal.SIGUSR1,)) for place in ("rollout", "loss", "evaluation", "push")),
    *((place, (signal.SIGINT,)) for place in ("reward", "gradient", "state", "rotation")),
    *((place, TWICE) for place in ("rollout", "evaluation", "state", "push")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "numbers"), MOMENTS, ids=lambda it: it if isinstance(it, str) else f"{it[0].name}x{len(it)}"
)
def test_a_signal_in_the_middle_of_anything(tmp_path: Path, place: str, numbers: tuple[int, ...]) -> None:
    often = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "eval_steps": 1}
    often |= {"eval_strategy": "steps", "steps_per_generation": 1}
    inside = Inside(place, *numbers, nap=300.0 if numbers == TWICE else 0.0)
    code, _ = ended(tmp_path, inside, ["sleep", "600"], **often)
    found = newest(tmp_path)
    assert code == (130 if numbers == TWICE else 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
    assert found is not None and all(fault(path) is None for path in whole_looking(tmp_path).values())
    ahead = numbers == TWICE and place != "push"
    assert found.name == ("checkpoint-1" if ahead else "checkpoint-2"), "no step after this one"
    if numbers != TWICE:
        assert (tmp_path / "pushed").read_text() == str(found)


def test_a_signal_before_the_training_and_after_its_last_step(tmp_path: Path) -> None:
    code, _ = ended(tmp_path / "before", lambda run: tell((signal.SIGTERM,)))
    assert code == 0 and newest(tmp_path / "before") is None

    def after(run: Any) -> None:
        inner = run._maybe_log_save_evaluate
        run._maybe_log_save_evaluate = lambda *args, **kwargs: (
            inner(*args, **kwargs), run.state.global_step == STEPS and tell((signal.SIGTERM,))
        )  # fmt: skip

    code, _ = ended(tmp_path / "after", after)  # it saves nothing by itself
    assert code == 0 and newest(tmp_path / "after") == tmp_path / "after" / f"checkpoint-{STEPS}"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["None, 2", "Path('recipes/accelerate/zero2.yaml'), 2"])
def test_a_launcher_waits_for_processes_that_end_by_themselves(tmp_path: Path, launcher: str) -> None:
    """SIGTERM reaches every process once, and the launcher has the exit code that they have."""
    (tmp_path / "ends.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "said = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: said.append(1))\n"
        "here = pathlib.Path(sys.argv[1], os.environ['RANK'])\n"
        "here.touch()\n"
        "while not said:\n"
        "    time.sleep(0.1)\n"
        "time.sleep(2)\n"
        "here.write_text(str(len(said)))\n"
    )
    start = f"from srpo.launch import *; raise SystemExit(launch('ends', {launcher}, [{str(tmp_path)!r}]))"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "said.txt").open("w") as said:
        one = subprocess.Popen(
            [sys.executable, "-c", start], stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": path}
        )
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert one.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.1)
    one.send_signal(signal.SIGTERM)
    assert one.wait(60) == 0, (tmp_path / "said.txt").read_text()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]
    assert "Traceback" not in (tmp_path / "said.txt").read_text()
