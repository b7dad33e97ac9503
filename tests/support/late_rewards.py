"""Reward functions and worlds that do not answer, or die, for some completions. They run in processes of their own."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from srpo.run.signals import HEARD
from srpo.types import Columns


def _act(text: str) -> None:
    if text == "loop":
        while True:
            pass
    if text == "sleep":
        time.sleep(600)
    if text == "C":
        ctypes.PyDLL(None).sleep(600)  # with the lock of the interpreter
    if text == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "exit":
        os._exit(3)
    if text == "raise":
        raise KeyError("planted")
    if text == "told":
        for number in HEARD:
            os.kill(os.getpid(), number)
        child = subprocess.Popen(["sleep", "600"])
        child.terminate()
        assert child.wait() == -signal.SIGTERM
    if text.startswith("child:"):
        child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        Path(text.removeprefix("child:")).write_text(str(child.pid))
        time.sleep(600)


def length(completions: list[str], **_: Any) -> list[float]:
    [text] = completions
    _act(text)
    return [float(len(text))]


def telling(completions: list[str], trainer_state: Any, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    [text] = completions
    log_extra("said", [text.upper()])
    log_metric("letters", len(text))
    return [float(trainer_state)]


class Longer:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [float(len(completions[0]) + self.by)]


async def awaited(completions: list[str], **_: Any) -> list[float]:
    import asyncio

    [text] = completions
    if text == "sleep":
        await asyncio.sleep(600)
    return [float(len(text))]


def world(rows: Any, texts: Any) -> Columns:
    [text] = texts
    _act(text)
    return {"cost": [float(len(text))]}


def late_for(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Of a trainer: never answers for one completion in four."""
    [ids] = completion_ids
    if sum(ids) % 4 == 1:
        time.sleep(600)
    return [float(len(ids) % 3)]
