"""A training of two processes in which one dies, raises or hangs somewhere: forks of this process, gloo, real signals.

python tests/support/fault_cases.py [CASE...]       the table of all cases: what ended how, when, with which words
ENGINE=zero2 python tests/support/fault_cases.py ...      the same on zero2, zero3 or fsdp2
"""

import ctypes
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo")), str(TESTS.parent)]

import deepspeed  # noqa: F401  which every fork would import by itself
from core_helpers import config, dataset, digest, model, scripted, trainer
from sharded_weights_cases import engine_settings
from two_ranks import two_ranks

from srpo.run.whole import MANIFEST

HANG_DEADLINE = 10.0
NET = 300.0
"""Seconds after which a test gives up."""
PLACES = ("rollout", "reward", "world", "loss", "save", "evaluation", "push")
FAULTS = ("dies", "raises", "hangs")
CASES = [f"{fault} in {place}" for fault, place in itertools.product(FAULTS, PLACES)]
WRITERS = ("save", "push")
"""What one process does, the first; everywhere else the second is at fault."""
AT = 3
"""The step of the fault; the checkpoint before it is of step 2."""


def fault(kind: str) -> None:
    if kind == "dies":
        time.sleep(2.0)  # what a process that is killed has told is not older than a second
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raises":
        raise RuntimeError("planted")
    if kind == "hangs":
        time.sleep(600)
    if kind == "computes":
        while True:
            pass
    if kind == "hangs in C":
        time.sleep(2.0)
        ctypes.PyDLL(None).sleep(600)  # with the lock of the interpreter: no thread of the process runs


@dataclass
class Ended:
    """What is left of a training."""

    codes: list[int]
    seconds: float
    text: str
    """All that its processes have said, in order."""
    folder: Path

    @property
    def last(self) -> str:
        return self.text.strip().splitlines()[-1]


def made(folder: Path, act: Callable[[str], None] = lambda place: None, **changes: Any) -> Any:
    """A trainer that calls `act` with each place."""

    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        act("rollout")
        return scripted(prompts, trainer)

    def world(rows: Any, texts: Any) -> dict[str, list[Any]]:
        act("world")
        return {"cost": [0.01] * len(texts)}

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        act("reward" if run.model.training else "evaluation")
        return [float(digest(ids) % 3 == 0) for ids in completion_ids]

    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": AT, "per_device_eval_batch_size": 8}
    settings |= {"per_device_train_batch_size": 8, "hang_deadline": HANG_DEADLINE, **changes}
    run = trainer(
        config(folder, objective="srpo", **settings),
        model(),
        rewards=reward,
        rollout_func=rollouts,
        world=world,
        train_dataset=dataset(40),
        eval_dataset=dataset(4),
        save_beside=lambda _: act("save"),
    )
    theirs = run.bad_steps.loss

    def loss(*given: Any) -> Any:
        act("loss")
        return theirs(*given)

    run.bad_steps.loss = loss
    return run


def train(folder: Path, rank: int, case: str, **changes: Any) -> None:
    kind, _, place = case.partition(" in ")
    kind, place = (kind, place) if " in " not in place else ("hangs in C", place.rpartition(" in ")[2])

    run: Any = None

    def act(here: str) -> None:
        if run is None:  # the Hub asks what is beside the weights
            return
        late = run.state.global_step >= (AT if here in (*WRITERS, "evaluation") else AT - 1)
        if here == place and rank == int(place not in WRITERS) and late:
            fault(kind)

    if place == "push":
        changes |= {"push_to_hub": True, "hub_strategy": "every_save"}
    run = made(folder, act, **changes)
    if place == "push":
        # transformers calls it too, before the checkpoint is whole.
        run._push_from_checkpoint = lambda saved: act("push") if (Path(saved) / MANIFEST).is_file() else None
    assert run.accelerator.num_processes == 2
    run.train(resume_from_checkpoint=None if case else "auto")


def two(folder: Path, case: str, engine: str = "", **changes: Any) -> Ended:
    """Forks two processes that train, on an engine of `sharded_weights_cases`, until both have ended."""
    folder.mkdir(parents=True, exist_ok=True)

    def work(rank: int, port: int) -> None:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        train(folder, rank, case, **changes, **engine_settings(engine))

    return Ended(*two_ranks(folder, work, NET), folder)


def main() -> None:
    if sys.argv[1:2] == ["launched"]:
        return train(Path(sys.argv[3]), int(os.environ["RANK"]), sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        for i, case in enumerate(sys.argv[1:] or CASES):
            found = two(Path(scratch) / str(i), case, os.environ.get("ENGINE", ""))
            words = [line for line in found.text.splitlines() if "[watch]" in line or "process 1 of 2" in line]
            print(f"{case:24} {found.seconds:5.1f} s  {found.codes}  {words[-1] if words else found.last}", flush=True)
            if os.environ.get("ALL_WORDS"):
                print(found.text, flush=True)


if __name__ == "__main__":
    main()
