"""Processes forked from one that has imported everything, as ranks of a gloo group: start-up is paid once.

The process that forks must not have trained, nor made an accelerator: every group begins as if the interpreter had
just been started.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What a first training imports: once, here, and not in every process.
for late in ("pandas", "deepspeed", "peft", "transformers.models.qwen3.modeling_qwen3", "torch._dynamo"):
    importlib.import_module(late)


class Failed(AssertionError):
    """A rank raised, died or did not end; with the end of what it printed."""


def begin(count: int, work: Callable[..., object], *args: Any, log: Path) -> list[tuple[int, Path]]:
    """Start `count` processes that run `work(*args)`; with more than one, each finds itself a rank of a group.

    Args:
        log: what rank 3 prints goes to `LOG.3`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.freeze()  # collections in the new processes leave alone, and do not copy, what is here
    started = []
    for rank in range(count):
        path = Path(f"{log}.{rank}")
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            code = 1
            try:
                os.setsid()  # as torchrun's
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the process that has forked it
                with path.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                if count > 1:
                    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                    os.environ.update({name: str(value) for name, value in numbers.items()})
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                work(*args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        started.append((pid, path))
    return started


def ended(started: list[tuple[int, Path]], seconds: float = 1800) -> None:
    """Wait for all of them; the first that fails ends the others.

    Raises:
        Failed: with the log of a rank that failed.
    """
    left, deadline, bad = dict(started), time.monotonic() + seconds, None
    while left:
        for pid in [*left]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done and left.pop(pid) and status and bad is None:
                bad, deadline = dict(started)[pid], min(deadline, time.monotonic() + 10)  # the others may say why
        if left and time.monotonic() > deadline:
            bad = bad or next(iter(left.values()))
            for pid in [*left]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                left.pop(pid)
        time.sleep(0.02)
    if bad is not None:
        raise Failed(f"{bad.name}: {bad.read_text()[-3000:]}")


def group(count: int, work: Callable[..., object], *args: Any, log: Path, seconds: float = 1800) -> None:
    """`begin`, and wait until all have `ended`."""
    ended(begin(count, work, *args, log=log), seconds)


def several(
    jobs: Iterator[Callable[[], list[tuple[int, Path]]]], at_once: int = 2, seconds: float = 1800
) -> list[str]:
    """Run what each job begins, so many at once; returns what went wrong."""
    running: list[list[tuple[int, Path]]] = []
    wrong: list[str] = []

    def finish() -> None:
        try:
            ended(running.pop(0), seconds)
        except Failed as error:
            wrong.append(str(error))

    for job in jobs:
        while len(running) >= at_once:
            finish()
        running.append(job())
    while running:
        finish()
    return wrong
