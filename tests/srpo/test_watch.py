"""The rules of srpo.run.watch between two real processes that do no more than a collective (gloo)."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  which both forks would import
import torch.distributed as dist
from two_ranks import two_ranks

from srpo.run.signals import heeded
from srpo.run.watch import beat, part, watched

pytestmark = pytest.mark.distributed
HANG = 5.0
NET = 300.0
"""Seconds after which a test gives up."""


def two(folder: Path, act: Callable[[int], object], launcher: bool = False) -> tuple[list[int], str]:
    """Exit codes of two forks that are at it, and all that they said.

    Args:
        launcher: asks the other with SIGTERM when one has ended, as torchrun does.
    """

    def work(rank: int, port: int) -> None:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        with heeded(), watched(HANG, HANG):
            dist.barrier()
            act(rank)

    codes, _, words = two_ranks(folder, work, NET, launcher)
    return codes, words


def together() -> None:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, 1)


def guilty(act: Callable[[], object], rank: int = 1) -> Callable[[int], None]:
    """One process acts in its reward part, where the other waits for it."""

    def both(me: int) -> None:
        with part("reward"):
            if me == rank:
                time.sleep(2.0)  # the others have heard where it is
                act()
            together()

    return both


def planted() -> None:
    raise RuntimeError("planted")


def test_an_exception_ends_both_and_is_the_last_word(tmp_path: Path) -> None:
    codes, said = two(tmp_path, guilty(planted))
    assert codes == [1, 1]
    assert said.rstrip().endswith("RuntimeError: planted\nprocess 1 of 2, in: reward") and said.count("Traceback") == 1
    assert said.startswith("[watch] process 0 ends, in: reward; process 1 says why\n")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow, id="with the store"), 1])
def test_a_process_that_is_killed_is_named(tmp_path: Path, rank: int) -> None:
    codes, said = two(tmp_path, guilty(lambda: os.kill(os.getpid(), signal.SIGKILL), rank), launcher=True)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    last = said[said.rindex("[watch]") :]
    assert f"process {rank} has died (killed, or out of memory?), last seen in: reward, at {__file__}:" in last


@pytest.mark.parametrize(
    "how",
    ["sleeps", *(pytest.param(how, marks=pytest.mark.slow) for how in ("computes", "holds the interpreter in C"))],
)
def test_a_process_that_hangs_is_named_with_its_line(tmp_path: Path, how: str) -> None:
    def hang() -> None:
        if how == "sleeps":
            time.sleep(600)
        if how == "holds the interpreter in C":
            ctypes.PyDLL(None).sleep(600)
        while True:
            pass

    codes, said = two(tmp_path, guilty(hang))
    assert codes[0] == 1 and codes[1] in (1, -signal.SIGKILL)
    last = said[said.rindex("[watch]") :]
    assert f"nothing moves within hang_deadline ({HANG:g} s): process 1: reward, for " in last
    assert f"at {__file__}:" in last and "process 0: reward, for" in last


@pytest.mark.slow
def test_what_moves_on_may_take_longer(tmp_path: Path) -> None:
    def slowly(rank: int) -> None:
        with part("rollout"):
            for _ in range(5):
                time.sleep(0.3 * HANG)
                beat()
                together()
        time.sleep(HANG * rank / 2)  # one leaves before the other, and is no fault

    assert two(tmp_path, slowly) == ([0, 0], "")


@pytest.mark.slow
def test_outside_of_training_a_wait_for_others_ends_too(tmp_path: Path) -> None:
    def one_never_comes(rank: int) -> None:
        if rank == 1:
            time.sleep(600)
        together()

    codes, said = two(tmp_path, one_never_comes)
    assert codes == [1, 1] and f"nothing moves within ddp_timeout ({HANG:g} s): process 1: start, for " in said


def test_a_fault_that_both_find_is_left_to_whoever_catches_it(tmp_path: Path) -> None:
    def both(_: int) -> None:
        with suppress(RuntimeError):
            planted()
        planted()

    def caught(rank: int) -> None:
        with suppress(RuntimeError), watched(HANG, HANG):  # within the other one, as a trainer's
            both(rank)
        together()

    assert two(tmp_path, caught) == ([0, 0], "")
    codes, said = two(tmp_path, both)
    assert codes == [1, 1] and "[watch]" not in said


def test_a_hang_of_a_process_alone_ends_it(tmp_path: Path) -> None:
    script = "import time\nfrom srpo.run.watch import part, watched\n"
    script += "with watched(2.0, 2.0), part('evaluation', prefix=True), part('world'):\n    time.sleep(600)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=NET)
    assert done.returncode == 1
    assert "nothing moves within hang_deadline (2 s): process 0: evaluation, world, for" in done.stderr
