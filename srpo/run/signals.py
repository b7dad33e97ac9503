"""SIGTERM, SIGUSR1 (Slurm's notice) and Ctrl-C: a run ends as it was asked to, and no process of it stays.

    in training    the step is finished and a whole checkpoint saved (and pushed, where runs push); exit code 0
    elsewhere      at once, since there is nothing to lose: exit code 0
    in training, and the step takes longer than `signal_deadline`, or SIGINT again    at once, with code 1 or 130

Signals are heard by a thread too, so that deadline and second Ctrl-C also end a process that is stuck in a call.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ONE_PRESS = 0.5
"""Seconds within which two SIGINTs are one: a terminal sends it to a launcher and to its processes."""
_CHILDREN = 3.0
"""Seconds that child processes have to end by themselves."""


class Interrupted(SystemExit):
    """A run has ended because a signal asked for it; nothing it had made is lost."""

    def __init__(self) -> None:
        super().__init__(0)


class Signals:
    """What a process has been asked.

    Attributes:
        asked: name of the first signal; "": none.
    """

    def __init__(self) -> None:
        self.deadline, self.asked, self._waits = 120.0, "", False
        self._since = 0.0

    @contextmanager
    def waited_for(self, deadline: float) -> Iterator[None]:
        """Inside, a signal is only noted: whoever is here looks at `asked`, and ends within `deadline` seconds."""
        self.deadline, self._waits = deadline, True
        try:
            yield
        finally:
            self._waits = False

    def left(self) -> float:
        """Seconds until the process ends in any case; infinite where no signal has come."""
        return self._since + self.deadline - time.monotonic() if self._since else math.inf

    def _handle(self, number: int, _frame: Any) -> None:
        """In the main thread, as soon as it runs Python again."""
        self.asked = self.asked or signal.Signals(number).name
        if not self._waits:
            _say(f"{self.asked}: the run ends here; what it has saved stays")
            raise Interrupted

    def _watch(self, pipe: int) -> None:
        """In a thread of its own, whatever the main thread does."""
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number not in HEARD:
                    continue
                if not self._since:
                    self._since = time.monotonic()
                    timer = threading.Timer(self.deadline, self._late)
                    timer.daemon = True
                    timer.start()
                    if self._waits:
                        then = f"this step is finished and saved, within {self.deadline:g} s; Ctrl-C ends it at once"
                        _say(f"{signal.Signals(number).name}: {then}")
                elif number == signal.SIGINT and time.monotonic() - self._since > _ONE_PRESS:
                    _say("SIGINT again: the run ends at once")
                    _leave(130)
        os.close(pipe)

    def _late(self) -> None:
        _say(
            f"the step has not ended within signal_deadline ({self.deadline:g} s), and is abandoned: "
            "resume_from_checkpoint: auto goes on from the last whole checkpoint"
        )
        _leave(1)


_current: Signals | None = None


@contextmanager
def heeded() -> Iterator[Signals]:
    """Inside, signals do as this module says. Within another such context, and in other threads, it changes nothing.

    Handlers that somebody else has set stay.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Signals()
        return
    _current = signals = Signals()
    heard = [number for number in HEARD if signal.getsignal(number) in _DEFAULT]
    before = {number: signal.signal(number, signals._handle) for number in heard}
    read, write = os.pipe()
    os.set_blocking(write, False)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=signals._watch, args=(read,), daemon=True, name="signals").start()
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        _current = None
        if signals.asked:
            end_children()


def _unheard(number: int, _frame: Any) -> None:
    """Unlike SIG_IGN this is not inherited by other programs."""


_DEFAULT = (signal.SIG_DFL, signal.default_int_handler, _unheard)


def _in_child() -> None:
    """A forked process, such as a data loader's, ends when its parent ends it, by SIGTERM: the run needs it until it
    has finished its step. It tells its parent nothing."""
    global _current
    if _current is not None:
        _current = None
        signal.set_wakeup_fd(-1)
        for number in HEARD:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else _unheard)


def turn_deaf() -> None:
    """For a process that a run needs until it has finished its step: a terminal and Slurm tell every process.

    It is killed when the run ends. Processes that it starts itself die of signals as usual.
    """
    for number in HEARD:
        signal.signal(number, _unheard)
    os.register_at_fork(after_in_child=_die_as_usual)


def _die_as_usual() -> None:
    for number in HEARD:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)


def end_children() -> None:
    """Ask all processes that this one has started to end, and those that do not are killed."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for act in ("terminate", "kill"):
        for child in children:
            with suppress(psutil.Error):
                getattr(child, act)()
        _, children = psutil.wait_procs(children, timeout=_CHILDREN)


def _leave(code: int) -> None:
    end_children()
    os._exit(code)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"[signal] {text}\n".encode())
