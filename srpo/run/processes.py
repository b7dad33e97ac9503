"""What one process of a run does for all."""

import atexit
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from srpo.types import Stopped

_PIECE = 5.0
"""Seconds of one wait for something long."""


class Refused(ValueError):
    """What a run cannot do, found by its main process and raised on all.

    Args:
        said: by another process of the run.
    """

    def __init__(self, words: str, said: bool = False) -> None:
        super().__init__(words)
        self.said = said


class Elsewhere(Stopped):
    """Another process of the run has raised what this one is told of."""


def main_process(act: Callable[[], Any], refused: type[Refused]) -> Any:
    """What `act` returned on the main process, on every one.

    Args:
        refused: the exception that its ValueError or OSError becomes, everywhere.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    told: list[Any] = [None, None]  # what it returned, and what it raised
    state.wait_for_everyone()  # what the others still have to write or read in the folder
    if state.is_main_process:
        try:
            told[0] = act()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(told)
    if told[1] is not None:
        raise refused(told[1], not state.is_main_process)
    return told[0]


def main_process_long(act: Callable[[], Any]) -> Any:
    """What `act` returned on the main process, on every one, however long that takes.

    The others wait in short pieces, so that neither a collective's deadline nor `hang_deadline` ends a run that only
    waits for the Hub. What `act` raises is raised on the main process; `srpo.run.watch` ends the others.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from srpo.run.watch import beat

    state = PartialState()
    if state.num_processes == 1:
        return act()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act) if state.is_main_process else None
        while True:
            told: list[Any] = [False, None]  # whether it is done, and what it returned
            if acting is not None:
                wait([acting], _PIECE)
                told = [True, acting.result()] if acting.done() else told
            broadcast_object_list(told)
            beat()
            if told[0]:
                return told[1]


@atexit.register
def leave_gloo() -> None:
    """End a process group of gloo before the interpreter ends, in whatever way the process does.

    A thread of it that lets go of a tensor while Python shuts down kills the process ("terminate called without an
    active exception", exit code -6 instead of ours). Other backends have no such threads, and may wait for processes
    that are no more: their groups are left as they are.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
