"""One event loop in its own thread, on which a rollout's episodes live: they wait for their worlds at the same time.

What may go wrong, and what it costs:

    an exception        that episode is lost, with the exception as its cause
    waiting too long    that episode is lost: its task is cancelled, and left alone if it will not end
    blocking            that episode is lost, whether it computes for ever or hangs in a C call

The last is why coroutines do not run in the loop's thread: each stretch between two `await`s runs in a second thread
while the loop's thread waits for it, so that nothing ever runs at the same time. A stretch that does not come back is
left behind with its thread (an exception ends it as soon as it runs Python code), and a new thread goes on. The others
stood still meanwhile: time in which the loop could not run is not counted against them.
"""

import asyncio
import contextvars
import ctypes
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_TICK = 0.05
_GRACE = 0.5

Job = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Failure:
    """In place of a result: why there is none."""

    cause: str


class EpisodeLoop:
    """Runs batches of jobs at the same time; close it when no more are to come, or use it as a context."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stretches: _Stretches | None = None

    def __enter__(self) -> "EpisodeLoop":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> None:
        """Start its threads now: before several threads call `run`. Else its first call does."""
        self._started()

    def run(self, jobs: Sequence[Job], seconds: float, blocking: float | None = None) -> list[Any]:
        """Results of all jobs; a `Failure` for each that raised, took more than `seconds`, or blocked for too long.

        Args:
            blocking: seconds between two `await`s of a job; None: `seconds`. The last value given holds for all jobs.

        After `start` several threads may call it at the same time: their jobs share the loop.
        """
        if not jobs:
            return []
        loop = self._started()
        self._stretches.seconds = seconds if blocking is None else blocking  # type: ignore[union-attr]
        future = asyncio.run_coroutine_threadsafe(_all(jobs, seconds), loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C and the like
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is left and end the threads."""
        loop, thread, stretches = self._loop, self._thread, self._stretches
        self._loop = self._thread = self._stretches = None
        if loop is None or thread is None or stretches is None:
            return
        cancelled = asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
        cancelled.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        thread.join()
        stretches.close()
        loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()
            self._stretches = stretches = _Stretches(loop)
            loop.set_task_factory(lambda _, c, **kwargs: asyncio.Task(_Guarded(c, stretches), loop=loop, **kwargs))
            self._thread = threading.Thread(target=loop.run_forever, name="srpo-episodes", daemon=True)
            self._thread.start()
        return self._loop


class _Left(BaseException):
    """Raised in a thread that was left behind; no `except Exception` holds it up."""


class _Stretches:
    """The thread in which coroutines run, one stretch at a time, while the loop's thread waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.seconds = 60.0
        self._loop = loop
        self._start()

    def run(self, stretch: Callable[[], Any]) -> Any:
        """What `stretch()` returns or raises; TimeoutError if it blocks, and it is left behind."""
        self._inbox.put((stretch, asyncio.current_task()))
        try:
            result, error = self._outbox.get(timeout=self.seconds)
        except queue.Empty:
            self._leave()
            raise TimeoutError(f"blocked the event loop for more than {self.seconds:g} s") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _start(self) -> None:
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        arguments = (self._loop, self._inbox, self._outbox)
        self._thread = threading.Thread(target=_serve, args=arguments, name="srpo-episodes-steps", daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        self._inbox.put(None)  # ends the thread if its stretch ever comes back
        ident = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Left))
        self._start()


def _serve(loop: Any, inbox: "queue.SimpleQueue[Any]", outbox: "queue.SimpleQueue[Any]") -> None:
    asyncio._set_running_loop(loop)  # for the code that asks; only one of the two threads runs at a time
    try:
        while (item := inbox.get()) is not None:
            stretch, task = item
            outbox.put(_outcome(stretch, loop, task))
    except _Left:
        pass


def _outcome(stretch: Callable[[], Any], loop: Any, task: Any) -> tuple[Any, BaseException | None]:
    own = asyncio.current_task() is not task  # from Python 3.14 on the current task is a thread's, not the loop's
    try:
        if own:
            asyncio._enter_task(loop, task)
        try:
            return stretch(), None
        finally:
            if own:
                asyncio._leave_task(loop, task)
    except _Left:
        raise
    except (SystemExit, KeyboardInterrupt) as error:  # would end the loop's thread, and with it everybody's episode
        return None, RuntimeError(f"{type(error).__name__}: {error}")
    except BaseException as error:
        return None, error


class _Guarded(Coroutine[Any, Any, Any]):
    """A coroutine whose every stretch runs through `_Stretches`."""

    def __init__(self, inner: Any, stretches: _Stretches):
        self._inner = inner
        self._stretches = stretches
        self._context: contextvars.Context | None = None

    def send(self, value: Any) -> Any:
        return self._run(lambda: self._inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._run(lambda: self._inner.throw(*error))

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("a task's coroutine is driven by its task")

    def _run(self, stretch: Callable[[], Any]) -> Any:
        # A context cannot be entered in two threads at once, and the task has entered its own: take one copy for good.
        self._context = self._context or contextvars.copy_context()
        context = self._context
        return self._stretches.run(lambda: context.run(stretch))


async def _all(jobs: Sequence[Job], seconds: float) -> list[Any]:
    tasks = [asyncio.ensure_future(job()) for job in jobs]
    late: set[Any] = set(tasks)
    try:
        late = await _wait(tasks, seconds)
    finally:
        for task in late:
            task.cancel()
        stubborn = await _wait(late, _GRACE)
        for task in late - stubborn:
            task.cancelled() or task.exception()  # seen: nothing is to be said about it later
    return [Failure(f"no answer within {seconds:g} s") if task in late else _result(task) for task in tasks]


async def _wait(tasks: Iterable[Any], seconds: float) -> set[Any]:
    """Wait for tasks; the ones that are not done. Time in which the loop was blocked does not count."""
    pending = set(tasks)
    while pending and seconds > 0:
        before = time.monotonic()
        _, pending = await asyncio.wait(pending, timeout=min(_TICK, seconds))
        seconds -= min(time.monotonic() - before, 2 * _TICK)
    return pending


def _result(task: "asyncio.Task[Any]") -> Any:
    if task.cancelled():
        return Failure("CancelledError")
    error = task.exception()
    return task.result() if error is None else Failure(f"{type(error).__name__}: {error}")


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_GRACE)
