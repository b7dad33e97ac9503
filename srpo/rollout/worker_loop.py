"""One event loop in its own thread, on which a rollout's episodes live: they wait for their worlds at the same time.

What may go wrong, and what it costs:

    an exception         that episode is lost, with the exception as its cause
    waiting too long     that episode is lost: its task is cancelled, and left alone if it will not end
    computing for ever   that episode is lost: an exception interrupts it

While one computes the others stand still, so time in which the loop could not run is not counted against them. A call
that blocks in C cannot be interrupted: what waits for a process or a socket without `await` belongs into `in_thread`,
which leaves it behind when it is late. Where it does not, the batch ends with an error that says so.
"""

import asyncio
import ctypes
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_TICK = 0.05
_GRACE = 0.5
_PATIENCE = 3
"""After so many interrupts without an answer a step blocks for good."""
_CLOSED = "the loop of these episodes is closed"

Job = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Failure:
    """In place of a result: why there is none."""

    cause: str


class _Blocked(BaseException):
    """Raised in the middle of a step that computes for too long; no `except Exception` holds it up."""


class EpisodeLoop:
    """Runs batches of jobs at the same time; close it when no more are to come, or use it as a context."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._interrupted = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> "EpisodeLoop":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> None:
        """Start its thread now: before several threads call `run`. Else its first call does."""
        with self._lock:
            self._started()

    def run(self, jobs: Sequence[Job], seconds: float) -> list[Any]:
        """Results of all jobs; a `Failure` for each that raised, took more than `seconds`, or computed for so long.

        After `start` several threads may call it at the same time: their jobs share the loop.

        Raises:
            RuntimeError: a job blocks the loop in a call that cannot be interrupted; the loop is closed, or was
                closed meanwhile: a thread that still plays ends here.
        """
        if not jobs:
            return []
        beat = [time.monotonic(), 0.0]  # when the loop last ran, and how often it was interrupted since
        with self._lock:
            loop = self._started()
            future = asyncio.run_coroutine_threadsafe(_all(jobs, seconds, beat), loop)
        try:
            while True:
                try:
                    return future.result(_TICK)
                except TimeoutError:
                    if self._closed:
                        raise RuntimeError(_CLOSED) from None
                    if time.monotonic() - beat[0] > seconds:
                        self._interrupt(seconds, beat)
        except _Blocked:  # it met our own code; the step that blocked is among these
            return [Failure(_blocked(seconds))] * len(jobs)
        except BaseException:  # Ctrl-C and the like
            future.cancel()
            raise

    def _interrupt(self, seconds: float, beat: list[float]) -> None:
        with self._lock:  # several threads may have noticed it
            if time.monotonic() - self._interrupted <= seconds:
                return
            self._interrupted = time.monotonic()
            beat[1] += 1
            ident = ctypes.c_ulong((self._thread and self._thread.ident) or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Blocked))
        if beat[1] > _PATIENCE:
            raise RuntimeError(
                f"a step {_blocked(time.monotonic() - beat[0])}, in a call that cannot be interrupted: let it wait in "
                "a thread (srpo.rollout.worker_loop.in_thread; `waits` of an agent environment)"
            )

    def close(self) -> None:
        """Cancel what is left and end the thread, for good; one that is blocked for ever is left behind."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            self._closed = True
        if loop is None or thread is None:
            return
        cancelled = asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
        cancelled.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        thread.join(10.0)
        if not thread.is_alive():
            loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        """Its event loop; called with the lock held."""
        if self._closed:
            raise RuntimeError(_CLOSED)
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(loop,), name="srpo-episodes", daemon=True)
            self._thread.start()
        return self._loop


async def in_thread(job: Callable[[], T]) -> T:
    """What `job` returns or raises. Cancelled, it leaves the thread behind: one that never ends holds up nobody."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():  # it was left behind
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = job()
        except StopIteration as raised:  # cannot pass through a future, nor through a coroutine
            error = RuntimeError(repr(raised))
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="environment-step", daemon=True).start()
    return await done


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            return loop.run_forever()
        except BaseException:  # a job's SystemExit, which its task holds as well, or an interrupt between two jobs
            continue


async def _all(jobs: Sequence[Job], seconds: float, beat: list[float]) -> list[Any]:
    tasks = [asyncio.ensure_future(job()) for job in jobs]
    late: set[Any] = set(tasks)
    try:
        late = await _wait(tasks, seconds, beat)
    finally:
        for task in late:
            task.cancel()
        stubborn = await _wait(late, _GRACE, beat)
        for task in late - stubborn:
            task.cancelled() or task.exception()  # seen: nothing is to be said about it later
    return [Failure(f"no answer within {seconds:g} s") if t in late else _result(t, seconds) for t in tasks]


async def _wait(tasks: Iterable[Any], seconds: float, beat: list[float]) -> set[Any]:
    """Wait for tasks; the ones that are not done. Time in which the loop was blocked does not count."""
    pending = set(tasks)
    while pending and seconds > 0:
        before = time.monotonic()
        beat[:] = before, 0.0
        _, pending = await asyncio.wait(pending, timeout=min(_TICK, seconds))
        seconds -= min(time.monotonic() - before, 2 * _TICK)
    return pending


def _result(task: "asyncio.Task[Any]", seconds: float) -> Any:
    if task.cancelled():
        return Failure("CancelledError")
    error = task.exception()
    if isinstance(error, _Blocked):
        return Failure(_blocked(seconds))
    return task.result() if error is None else Failure(f"{type(error).__name__}: {error}")


def _blocked(seconds: float) -> str:
    return f"blocked the event loop for more than {seconds:g} s"


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_GRACE)
