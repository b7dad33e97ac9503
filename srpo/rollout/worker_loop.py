"""One event loop in its own thread, on which a rollout's episodes live: they wait for their worlds at the same time.

What may go wrong, and what it costs:

    an exception         that episode is lost, with the exception as its cause
    waiting too long     that episode is lost: its task is cancelled, and left alone if it will not end
    computing for ever   that episode is lost: an exception interrupts it

While one computes the others stand still, so time in which the loop could not run is not counted against them. A call
that blocks in C cannot be interrupted: what waits for a process or a socket without `await` belongs into `in_thread`,
which leaves it behind when it is late. Where it does not, the batch ends with an error that says so.

Who plays starts jobs in a `Flow` and takes their results as they come, so that a slow one holds up nobody but itself.
"""

import asyncio
import ctypes
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_TICK = 0.05
_GRACE = 0.5
_PATIENCE = 3
"""After so many interrupts without an answer a step blocks for good."""
_CLOSED = "the loop of these episodes is closed"

Job = Callable[[], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Failure:
    """In place of a result: why there is none."""

    cause: str


class _Blocked(BaseException):
    """Raised in the middle of a step that computes for too long; no `except Exception` holds it up."""


class EpisodeLoop:
    """Runs jobs at the same time; close it when no more are to come, or use it as a context."""

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
        """Start its thread now: before several threads use it. Else the first job does."""
        with self._lock:
            self._started()

    def run(self, jobs: Sequence[Job], seconds: float) -> list[Any]:
        """Results of all jobs, in their order; else as `Flow`."""
        with Flow(self, seconds) as flow:
            flow.start(dict(enumerate(jobs)))
            found = flow.take(math.inf)
        return [found[i] for i in range(len(jobs))]

    def _call(self, what: Callable[[], object]) -> None:
        """On the loop, soon."""
        with self._lock:
            self._started().call_soon_threadsafe(what)

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


@dataclass
class _Running:
    """One job that has begun."""

    task: "asyncio.Task[Any]"
    since: float
    left: float
    """Seconds until it is late, and then until it is left behind."""
    late: bool = False


class Flow:
    """Jobs under way on a loop; a `Failure` in place of the result of each that raised, took more than `seconds`, or
    computed for so long.

    Used by one thread, as a context that cancels what is left at its end; several flows may share a loop.

    Raises:
        RuntimeError: of `start` and `take`: a job blocks the loop in a call that cannot be interrupted; the loop is
            closed, or was closed meanwhile: a thread that still plays ends here.
    """

    def __init__(self, loop: EpisodeLoop, seconds: float) -> None:
        self._owner, self.seconds = loop, seconds
        self._serials = itertools.count()
        self._waiting: dict[int, Any] = {}  # serial number -> key; the thread's that plays
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._beat = [time.monotonic(), 0.0]  # when the loop last ran, and how often it was interrupted since
        self._running: dict[int, _Running] = {}  # the loop's, as all that follows
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._waiting:  # Ctrl-C and the like
            with suppress(RuntimeError):
                self._owner._call(self._cancel)

    def __len__(self) -> int:
        """Jobs whose results are still to be taken."""
        return len(self._waiting)

    def start(self, jobs: Mapping[Any, Job]) -> None:
        """Begin jobs; `take` names their results by these keys. A key may come again once its result is taken."""
        if not jobs:
            return
        numbered = [(next(self._serials), job) for job in jobs.values()]
        self._waiting |= {serial: key for (serial, _), key in zip(numbered, jobs, strict=True)}
        self._beat[0] = time.monotonic()
        self._owner._call(lambda: self._begin(numbered))

    def take(self, window: float = 0.0) -> dict[Any, Any]:
        """Results that are there, at least one where a job is under way: waits for the first, and then for others, but
        no longer than `window` seconds and not when there are none."""
        found: dict[Any, Any] = {}
        until = math.inf
        while self._waiting:
            if self._owner._closed:
                raise RuntimeError(_CLOSED)
            left = min(until - time.monotonic(), _TICK)
            try:
                serial, result = self._results.get(timeout=left) if left > 0 else self._results.get_nowait()
            except queue.Empty:
                if left <= 0:
                    break
                if time.monotonic() - self._beat[0] > self.seconds:
                    self._owner._interrupt(self.seconds, self._beat)
                continue
            if serial in self._waiting:
                found[self._waiting.pop(serial)] = result
            if found and until == math.inf:
                until = time.monotonic() + window
        return found

    # ------------------------------------------------------------------------------------------------ on the loop

    def _begin(self, numbered: Sequence[tuple[int, Job]]) -> None:
        for serial, job in numbered:
            try:
                task = asyncio.ensure_future(job())
                self._running[serial] = _Running(task, time.monotonic(), self.seconds)
                task.add_done_callback(partial(self._end, serial))
            except _Blocked:  # meant for a job before it, which has just ended
                self._results.put((serial, Failure(_blocked(self.seconds))))
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while self._running:
            with suppress(_Blocked):  # meant for a job
                await self._tick()

    async def _tick(self) -> None:
        before = time.monotonic()
        self._beat[:] = before, 0.0
        await asyncio.sleep(max(min(_TICK, *(run.left for run in self._running.values())), 0.0))
        now = time.monotonic()
        for serial, run in list(self._running.items()):
            run.left -= min(now - max(before, run.since), 2 * _TICK)  # time in which the loop was blocked is not its
            if run.task.done() or (run.late and run.left <= 0):
                self._end(serial)
            elif run.left <= 0:
                run.task.cancel()
                run.late, run.left = True, _GRACE

    def _end(self, serial: int, _task: object = None) -> None:
        """Of a job that is done, or left behind."""
        run = self._running.get(serial)
        if run is None:
            return
        result: Any = Failure(f"no answer within {self.seconds:g} s")
        if not run.late:
            result = _result(run.task, self.seconds)
        elif run.task.done():
            run.task.cancelled() or run.task.exception()  # seen: nothing is to be said about it later
        self._results.put((serial, result))
        del self._running[serial]

    def _cancel(self) -> None:
        for run in self._running.values():
            run.task.cancel()


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
