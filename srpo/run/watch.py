"""No process of a run waits for another for ever, and the first fault ends all of them, with its cause as last word.

Every process notes in which part of the run it is. A thread of it tells the others, through the store of the process
group, and reads what they tell; another judges:

    a part of a step that takes `hang_deadline`     the run ends; said is where each process stands, file and line
    a wait for others outside of training           the same, after `ddp_timeout`
    a process that is no more                       the others end; said is in which part it was
    an exception                                    the others end without a word of their own; its traceback is last

What a collective says of a process that has gone (gloo, NCCL) is never taken for the cause. None of this needs the
main thread, which may be stuck in a collective, in a user's function, or in C.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from srpo.run.processes import Elsewhere
from srpo.run.signals import HEARD, end_children
from srpo.types import Stopped

_TICK = 0.5
"""Seconds between two looks; of more than 32 processes each looks less often."""
_PATIENCE = 5.0
"""Seconds for which what looks like another's fault waits for it to be told, and a fault for all to have heard it."""
_GRACE = 2.0
"""Seconds that a process has to raise the same fault by itself: a mistake that all processes find is no news."""
_LOST_STORE = 60.0
"""Seconds without an answer of the store, which lives in the launcher or in the first process."""
_THEN = "resume_from_checkpoint: auto goes on from the last whole checkpoint"
_WAITS = ("torch.distributed.distributed_c10d", "torch.distributed._functional_collectives")


class _Parts:
    """Where the main thread of this process is."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, bool, bool]] = [("start", False, True)]  # name, prefix of those inside, patient
        self.beats, self.since = 0, time.monotonic()

    def moved(self) -> None:
        self.beats += 1
        self.since = time.monotonic()

    def __str__(self) -> str:
        *around, (name, _, _) = self.stack
        return ", ".join([*(other for other, prefix, _ in around if prefix), name])


_parts = _Parts()
_current: "Watch | None" = None
_entered = 0


def enter(name: str) -> None:
    """A phase of the run begins, outside of training: it may take as long as it takes."""
    _parts.stack[0] = (name, False, True)
    _parts.moved()


@contextmanager
def part(name: str, prefix: bool = False, patient: bool = False) -> Iterator[None]:
    """Inside, the main thread is in this part of a step.

    Args:
        prefix: parts inside are named after it too.
        patient: it may take as long as it takes; others do not wait for it longer than for any part.
    """
    _parts.stack.append((name, prefix, patient))
    _parts.moved()
    try:
        yield
    except Exception as error:
        if not hasattr(error, "part"):
            error.part = str(_parts)  # type: ignore[attr-defined]
        raise
    finally:
        _parts.stack.pop()
        _parts.moved()


def beat() -> None:
    """The part that the main thread is in, or waits for, moves on."""
    _parts.moved()


@contextmanager
def watched(hang_deadline: float, wait_deadline: float) -> Iterator[None]:
    """Inside, this module's rules hold. All processes enter; within another such context it changes nothing.

    Args:
        hang_deadline: seconds of one part of a step without a beat.
        wait_deadline: seconds of one wait for other processes, outside of training.
    """
    global _current, _entered
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    from torch import distributed

    rank, size, store = 0, 1, None
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        # A connection of its own: the process group's may be busy with a wait.
        shared: Any = distributed.distributed_c10d._get_default_store()
        own = shared.clone()
        own.set_timeout(timedelta(seconds=_PATIENCE))
        store = distributed.PrefixStore(f"srpo/{_entered}", own)
    _entered += 1
    _current = watch = Watch(hang_deadline, wait_deadline, rank, size, store)
    try:
        yield
    except BaseException as error:
        watch.raised(error)
        raise
    finally:
        watch.stop()
        _current = None


class Watch:
    """One process's; see `watched`."""

    def __init__(self, hang_deadline: float, wait_deadline: float, rank: int, size: int, store: Any) -> None:
        self.hang_deadline, self.wait_deadline = hang_deadline, wait_deadline
        self.rank, self.size, self.store = rank, size, store
        self.others: dict[int, dict[str, Any]] = {}
        self.fault: dict[str, Any] | None = None  # the run's, whoever's
        self._pid, self._host = os.getpid(), _machine()
        self._main = threading.main_thread().ident or 0
        self._tick = max(_TICK, size / 64)
        self._over, self._ending = threading.Event(), threading.Lock()
        self._post, self._quiet, self._left, self._all_quiet = "", False, False, False
        self._heard, self._exchanges = time.monotonic(), 0
        self._dead: dict[int, int] = {}  # exchanges when a process was first seen to be no more
        self._news: dict[int, float] = {}  # when another last told something new
        self._wait, self._wait_since = (0, 0), time.monotonic()
        acts = [self._judge] if store is None else [self._judge, self._talk]
        self._threads = [threading.Thread(target=act, daemon=True, name="watch") for act in acts]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The process has left: nothing of what it does from now on concerns the others."""
        self._left = True
        if self.rank == 0 and self.fault is None:  # the store may end with this process, and they still talk
            self._until(lambda: all(told["left"] for told in self.others.values()))
        self._over.set()
        for thread in self._threads:
            thread.join(_PATIENCE)

    # ------------------------------------------------------------------------------------------------ with the others

    def _talk(self) -> None:
        """The one thread that uses the store: it may hang as well."""
        while True:
            over = self._over.wait(self._tick if not (self._post or self._quiet) else 0.1)
            with suppress(RuntimeError):  # DistError too: nobody answers now
                self._exchange()
                self._heard, self._exchanges = time.monotonic(), self._exchanges + 1
            if over:
                return

    def _exchange(self) -> None:
        store, everyone = self.store, range(self.size)
        told = {**self._status(), "count": self._exchanges, "left": self._left}
        if self._quiet:
            store.set(f"quiet/{self.rank}", "")
        store.set(f"at/{self.rank}", json.dumps(told))
        if self._left and self.rank:  # the first process, and the store with it, may end as soon as it reads this
            return
        if self._post:
            store.compare_set("fault", "", self._post)
            self._post = ""
        if self.fault is None and store.check(["fault"]):
            self.fault = json.loads(store.get("fault"))
        names = [f"at/{rank}" for rank in everyone]
        if not store.check(names):
            return
        for rank, value in enumerate(store.multi_get(names)):
            status = json.loads(value)
            if rank != self.rank and status["count"] != self.others.get(rank, {}).get("count"):
                self._news[rank], self.others[rank] = time.monotonic(), status
        if self.fault is not None and self.fault["rank"] == self.rank:
            left = [rank for rank in everyone if rank != self.rank and rank not in self._gone()]
            self._all_quiet = all(self.others[rank]["left"] or store.check([f"quiet/{rank}"]) for rank in left)

    def _status(self) -> dict[str, Any]:
        waits, at = _standing(self._main)
        return {
            "part": str(_parts),
            "seconds": round(time.monotonic() - _parts.since, 1),
            "beats": _parts.beats,
            "waits": bool(waits),
            "at": at,
            "pid": self._pid,
            "host": self._host,
        }

    def _gone(self) -> list[int]:
        """Processes of this machine that have ended without leaving."""
        return [
            rank
            for rank, told in self.others.items()
            if not told["left"] and told["host"] == self._host and not _lives(told["pid"])
        ]

    def _line(self, rank: int, told: dict[str, Any]) -> str:
        text = f"process {rank}: {told['part']}, for {told['seconds']:.0f} s, at {told['at']}"
        text += ", waits for others" if told["waits"] else ""
        silent = time.monotonic() - self._news.get(rank, time.monotonic())
        return text + (f"; no sign of it since {silent:.0f} s" if silent > max(_PATIENCE, 4 * self._tick) else "")

    def _report(self, cause: str, known: list[int]) -> str:
        """The cause, and where everybody else stands."""
        everyone = {self.rank: self._status(), **self.others}
        rest = [
            self._line(rank, told)
            for rank, told in sorted(everyone.items())
            if rank not in known and not told.get("left") and rank not in self._gone()
        ]
        return "\n".join([cause, *(f"    {line}" for line in rest), f"    {_THEN}"])

    # ------------------------------------------------------------------------------------------------ judging

    def _judge(self) -> None:
        while not self._over.wait(self._tick) and not self._left:
            if self.fault is not None:
                self._over.wait(_GRACE)
                if not self._over.is_set() and self._ending.acquire(blocking=False):
                    self._follow()
                return
            words = self._overdue() or self._died() or self._alone()
            if words and self._ending.acquire(blocking=False):
                self._lead(words)

    def _overdue(self) -> str:
        own, now = self._status(), time.monotonic()
        wait = (_standing(self._main)[0], _parts.beats)
        if not wait[0] or wait != self._wait:
            self._wait, self._wait_since = wait, now
        inside, patient = len(_parts.stack) > 1, _parts.stack[-1][2]
        limit = self.hang_deadline if inside else self.wait_deadline
        stuck = not patient and now - _parts.since > self.hang_deadline
        if not stuck and not (own["waits"] and now - self._wait_since > limit):
            return ""
        name = "hang_deadline" if inside else "ddp_timeout"
        there = {rank: told for rank, told in {self.rank: own, **self.others}.items() if not told.get("left")}
        busy = {rank: told for rank, told in there.items() if not told["waits"]} or there
        last = min(told["beats"] for told in busy.values())
        guilty = [rank for rank, told in sorted(busy.items()) if told["beats"] == last]
        lines = "; ".join(self._line(rank, there[rank]) for rank in guilty)
        return self._report(f"nothing moves within {name} ({limit:g} s): {lines}", guilty)

    def _died(self) -> str:
        gone = [rank for rank in self._gone() if self._dead.setdefault(rank, self._exchanges) + 1 < self._exchanges]
        if not gone:  # or it may have left, and not been heard
            return ""
        return self._obituary(gone)

    def _obituary(self, gone: list[int]) -> str:
        lines = [
            f"process {rank} has died (killed, or out of memory?), last seen in: {self.others[rank]['part']}, "
            f"at {self.others[rank]['at']}"
            for rank in gone
        ]
        return self._report("; ".join(lines), gone)

    def _alone(self) -> str:
        if self.store is None or time.monotonic() - self._heard < _LOST_STORE:
            return ""
        cause = (
            f"no answer since {_LOST_STORE:g} s of the store that the processes share: launcher or process 0 is gone"
        )
        return self._report(f"{cause}, or cut off", [])

    # ------------------------------------------------------------------------------------------------ ending

    def raised(self, error: BaseException) -> None:
        """The main thread leaves with this; returns where it may go on, because it is the cause, or no fault."""
        # A launcher asks the others to end when one has: from here on the answer is under way.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in HEARD}
        try:
            if not self._ending.acquire(blocking=False):
                threading.Event().wait()  # the thread that judges ends this process
            self._settle(error)
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _settle(self, error: BaseException) -> None:
        if not isinstance(error, Exception):  # a signal, sys.exit
            if isinstance(error, SystemExit) and self._gone():  # the launcher may have sent it, because of that
                self._until(lambda: bool(self._died()) or not self._gone())
                if gone := self._gone():
                    self._lead(self._obituary(gone))
            return
        here = getattr(error, "part", str(_parts))
        error.add_note(f"process {self.rank} of {self.size}, in: {here}" if self.size > 1 else f"in: {here}")
        if self.store is None:
            return
        collective = _of_a_collective(error)
        if collective or isinstance(error, Elsewhere) or getattr(error, "said", False):
            self._until(lambda: self.fault is not None or bool(self._gone()))
        if self.fault is None and (collective or self._gone()):
            gone, vain = self._gone(), f"process {self.rank} waits in vain for another in: {here}"
            words = self._obituary(gone) if gone else self._report(vain, [self.rank])
            self._lead(words, after=error)
        from srpo.cli import is_mistake

        words = f"{type(error).__name__}: {error}"
        code = error.code if isinstance(error, Stopped) else 2 if is_mistake(error) else 1
        if code == 2 and self.rank:  # what all find is said by the first
            self._until(lambda: self.fault is not None, _GRACE)
        if not self._is_ours(words, here, code):
            assert self.fault is not None
            if self.fault["words"] != words:
                self._follow()
            error.said = self._quiet = True  # type: ignore[attr-defined]
            return
        error.first = True  # type: ignore[attr-defined]
        self._until(lambda: self._all_quiet)
        self._end_the_deaf()
        if code == 1:
            _record(error)

    def _is_ours(self, words: str, here: str, code: int) -> bool:
        """Tell the others of a fault; False: another process was first."""
        told = {"rank": self.rank, "words": words, "part": here, "code": code, "pid": self._pid, "host": self._host}
        if self.store is None:
            return True
        self._post = json.dumps(told)
        self._until(lambda: self.fault is not None)
        return self.fault is None or self.fault["rank"] == self.rank  # None: the store is no more

    def _lead(self, words: str, after: BaseException | None = None) -> None:
        """End all processes, this one last but for its words."""
        if not self._is_ours(words, str(_parts), 1):
            self._follow()
        if self.store is not None:
            self._until(lambda: self._all_quiet)
            self._end_the_deaf()
        end_children()
        if after is not None:
            _say("".join(traceback.format_exception(after)))
        _say(f"[watch] the run ends: {words}\n")
        try:
            raise RuntimeError(words)
        except RuntimeError as error:
            _record(error)
        os._exit(1)

    def _follow(self) -> None:
        """End after another's fault, in silence."""
        assert self.fault is not None
        _say(f"[watch] process {self.rank} ends, in: {_parts}; process {self.fault['rank']} says why\n")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        self._quiet = True
        end_children()
        here = self.fault["host"] == self._host
        self._until(lambda: here and not _lives(self.fault["pid"]))  # type: ignore[index]
        os._exit(self.fault["code"])

    def _end_the_deaf(self) -> None:
        """Kill the processes of this machine that have not heard, because they are stuck without their threads."""
        if self._all_quiet:
            return
        for rank, told in self.others.items():
            silent = time.monotonic() - self._news[rank] > _PATIENCE
            if silent and not told["left"] and told["host"] == self._host and _lives(told["pid"]):
                with suppress(ProcessLookupError):
                    os.kill(told["pid"], 9)

    def _until(self, holds: Callable[[], bool], seconds: float = _PATIENCE) -> None:
        until = time.monotonic() + seconds + self._tick
        while not holds() and time.monotonic() < until:
            time.sleep(0.05)


def _standing(thread: int) -> tuple[int, str]:
    """Which call of a collective a thread waits in (0: none), and its innermost line that is no library's."""
    frame: FrameType | None = sys._current_frames().get(thread)
    waits, at = 0, ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not waits and frame.f_globals.get("__name__") in _WAITS:
            waits = id(frame)
        if not at and "site-packages" not in file and not file.startswith((sys.base_prefix, "<frozen")):
            at = f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, at or "an unknown line"


def _machine() -> str:
    """Where a process's number means the same process."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown {os.getpid()}"


def _lives(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _of_a_collective(error: Exception) -> bool:
    """Whether it says no more than that another process does not answer."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _record(error: BaseException) -> None:
    """For torchrun and accelerate, whose last words are a table of what their processes have recorded."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with suppress(OSError):
            get_error_handler().record_exception(error)


def _say(text: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
