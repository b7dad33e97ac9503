"""One thread with one event loop, on which a rollout's episodes live: they wait for their worlds at the same time.

What may go wrong, and what it costs:

    an exception             that episode is lost, with the exception as its cause
    waiting too long         that episode is lost: its task is cancelled, and left alone if it will not end
    a busy or blocking step  nobody else can move meanwhile. Time that the loop could not run does not count for the
                             others. After the deadline the step's Python code is interrupted by an exception. Code
                             that no exception can reach (a C call) keeps its thread, and a new one starts: jobs that
                             had not begun begin there, those in flight are lost beside the culprit
"""

import asyncio
import ctypes
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_TICK = 0.05
_GRACE = 1.0

Job = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Failure:
    """In place of a result: why there is none."""

    cause: str


class _Interrupted(BaseException):
    """Raised by us inside a step that blocks the loop; no `except Exception` of the step holds it up."""


class EpisodeLoop:
    """Runs batches of jobs on its own thread; close it when no more are to come, or use it as a context."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._beat = 0.0

    def __enter__(self) -> "EpisodeLoop":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, jobs: Sequence[Job], seconds: float) -> list[Any]:
        """Results of all jobs, run at the same time; a `Failure` for each that raised or took more than `seconds`."""
        results: list[Any] = [None] * len(jobs)
        todo = list(range(len(jobs)))
        while todo:
            batch = _Batch([jobs[i] for i in todo], seconds)
            loop = self._started()
            future = asyncio.run_coroutine_threadsafe(batch.play(self._note_beat), loop)
            try:
                blocked = self._watch(future, seconds)
            except BaseException:  # Ctrl-C and the like: leave no task behind
                future.cancel()
                raise
            if blocked:
                batch.accuse(asyncio.current_task(loop))
                loop.call_soon_threadsafe(loop.stop)  # ends the thread when its C call ever returns
                self._loop = self._thread = None
            for i, result in zip(todo, batch.results, strict=True):
                results[i] = result
            if not blocked:
                break
            todo = [i for i, begun in zip(todo, batch.begun, strict=True) if not begun]
            for i in todo:
                results[i] = None
        return results

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).add_done_callback(
            lambda _: loop.call_soon_threadsafe(loop.stop)
        )
        thread.join(timeout=2 * _GRACE)
        if not thread.is_alive():
            loop.close()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="srpo-episodes", daemon=True)
            self._thread.start()
        return self._loop

    def _note_beat(self) -> None:
        self._beat = time.monotonic()

    def _watch(self, future: Any, seconds: float) -> bool:
        """Wait for the batch. True: the loop was given up, blocked."""
        self._note_beat()
        interrupted = False
        while True:
            try:
                future.result(timeout=_TICK)
                return False
            except TimeoutError:
                silent = time.monotonic() - self._beat
            if silent < seconds + 0.5:
                interrupted = False
            elif not interrupted:
                interrupted = True
                _raise_in(self._thread, _Interrupted)
            elif silent > seconds + 0.5 + _GRACE:
                return True


class _Batch:
    def __init__(self, jobs: Sequence[Job], seconds: float):
        self.jobs = jobs
        self.seconds = seconds
        self.begun = [False] * len(jobs)
        self.results: list[Any] = [Failure("another episode blocked the event loop meanwhile")] * len(jobs)
        self._tasks: list[asyncio.Task[None]] = []

    async def play(self, beat: Callable[[], None]) -> None:
        self._tasks = [asyncio.ensure_future(self._one(i)) for i in range(len(self.jobs))]
        late: set[asyncio.Task[None]] = set()
        try:
            late = await _wait(self._tasks, self.seconds, beat)
            for task in late:
                self.results[self._tasks.index(task)] = Failure(f"no answer within {self.seconds:g} s")
        finally:
            for task in self._tasks:
                task.cancel()
            await _wait(late, _GRACE, beat)

    def accuse(self, culprit: Any) -> None:
        """Name the step that held the loop when it was given up."""
        if culprit in self._tasks:
            self.results[self._tasks.index(culprit)] = self._blocked()

    def _blocked(self) -> Failure:
        return Failure(f"blocked the event loop for more than {self.seconds:g} s")

    async def _one(self, i: int) -> None:
        self.begun[i] = True
        try:
            result = await self.jobs[i]()
        except _Interrupted:
            result = self._blocked()
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # late: `play` has said why
                raise
            result = Failure("CancelledError")
        except Exception as error:
            result = Failure(f"{type(error).__name__}: {error}")
        self.results[i] = result


async def _wait(tasks: Iterable["asyncio.Task[None]"], seconds: float, beat: Callable[[], None]) -> Any:
    """Wait for tasks; the ones that are not done. Time in which the loop was blocked does not count."""
    pending = set(tasks)
    while pending and seconds > 0:
        beat()
        before = time.monotonic()
        _, pending = await asyncio.wait(pending, timeout=min(_TICK, seconds))
        seconds -= min(time.monotonic() - before, 2 * _TICK)
    return pending


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_GRACE)


def _raise_in(thread: threading.Thread | None, error: type[BaseException]) -> None:
    if thread is not None and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))
