"""Plays episodes by rules: many at once, in this process or in others, each at its own risk.

What may go wrong, and what it costs:

    the world or an executor raises, or a step takes too long     that episode is lost, and played again with the same
    no call of an episode was answered, or a circuit was open     seed; lost again, it counts as failed, at its cost
    episodes of STREAK different tasks in a row are lost          the phase stops; what is finished is kept
    the run's money does not pay for a call                       the same; that episode is nobody's failure

A call that fails within an episode is none of these: it is a wasted step that costs what was billed.
"""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any

from routers.pool.protocol import CIRCUIT_OPEN
from routers.tasks.step_routing.environment import TASK, BudgetEnvironment, BudgetEpisode, Driven, drive_episode
from routers.tasks.step_routing.jobs import Job
from srpo.rollout.worker_loop import EpisodeLoop, Failure
from srpo.types import CORRECT, COST, LOST, Observation, Stopped

STREAK = 8
STEP_SECONDS = 120.0
PAUSE = 30.0
"""Seconds before a lost episode is played again where executors are live: an endpoint may be restarting."""
_TOGETHER = 16
NOTHING = {COST: 0.0, "calls": 0, "members": [], "large_calls": 0, "budget_used": None, "budget_violated": False}
"""Columns of an episode that could not even be made."""


RAISE = (
    "The next call might cost more than what is left. Raise it, and start the same command again: it goes on from here"
)


class PhaseStopped(Stopped):
    """A phase cannot go on. What it has finished is kept: the same command goes on from there."""


class Player:
    """Plays jobs (`routers.tasks.step_routing.jobs.PlayAll`).

    Args:
        make: the environment. Called once per process; it must be picklable where there are several.
        processes: for executors that compute.
        threads: for executors that wait: so many episodes at once, in one event loop; 0: they do not wait.
        seconds: of one step, and that a world may block everybody.
        pause: seconds before a lost episode is played again.

    Raises:
        PhaseStopped: see above; raised while results are taken.
    """

    def __init__(
        self,
        make: Callable[[], BudgetEnvironment],
        *,
        processes: int = 1,
        threads: int = 0,
        seconds: float = STEP_SECONDS,
        pause: float = 0.0,
    ) -> None:
        self._make = make
        self._processes, self._threads, self._seconds, self._pause = processes, threads, seconds, pause

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        # Computed episodes are shorter than the way through two threads, so that several make the way together.
        size = 1 if self._threads else _TOGETHER
        chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        play = self._elsewhere if self._processes > 1 and len(chunks) > 1 else self._here
        return _stop_streaks(play(chunks))

    def _elsewhere(self, chunks: Sequence[Sequence[Job]]) -> Iterator[tuple[Job, Driven]]:
        # Not fork: the parent may hold threads of torch, and a forked copy of their locks never opens.
        context, start = multiprocessing.get_context("spawn"), (self._make, self._seconds, self._pause)
        with ProcessPoolExecutor(self._processes, context, _start, start) as pool:
            for played in pool.map(_play, chunks):
                yield from played

    def _here(self, chunks: Sequence[Sequence[Job]]) -> Iterator[tuple[Job, Driven]]:
        with (
            ThreadPoolExecutor(self._threads or 1) as threads,
            _Table(self._make(), self._seconds, self._pause) as table,
        ):
            futures = [threads.submit(table.play, chunk) for chunk in chunks]
            try:
                for future in as_completed(futures):
                    yield from future.result()
            finally:
                for future in futures:
                    future.cancel()
            if table.environment.out_of_money():
                spent = table.environment.spent_usd()
                raise PhaseStopped(f"max_cost_usd is reached: ${spent:.4f} are spent. {RAISE}")


def _stop_streaks(played: Iterator[tuple[Job, Driven]]) -> Iterator[tuple[Job, Driven]]:
    """Hold lost episodes back until another one has worked: in a streak they are nobody's failure."""
    held: list[tuple[Job, Driven]] = []
    worked = False
    for job, driven in played:
        if driven.stop != "lost":
            worked = True
            yield from _told(held)
            held = []
            yield job, driven
            continue
        held.append((job, driven))
        if len({job.row[TASK] for job, _ in held}) >= STREAK:
            break
    unanswered = [driven for _, driven in held if driven.columns[LOST].startswith(_UNANSWERED)]
    if held and (len({job.row[TASK] for job, _ in held}) >= STREAK or (not worked and len(unanswered) == len(held))):
        raise PhaseStopped(
            f"{len(held)} episodes in a row were lost, twice each; the last: {held[-1][1].columns[LOST]}. They are "
            "not counted: start the same command again when that is mended"
        )
    yield from _told(held)


def _told(lost: Sequence[tuple[Job, Driven]]) -> Iterator[tuple[Job, Driven]]:
    for job, driven in lost:
        print(f"WARNING: lost twice, counts as failed: {job.key}: {driven.columns[LOST]}", flush=True)
        yield job, driven


_UNANSWERED = "no call was answered"


def twice(jobs: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Results of short jobs that may raise or hang, at their second attempt where the first failed; a `Failure` for
    each that failed again."""
    with EpisodeLoop() as loop:
        found = loop.run(jobs, math.inf, blocking=STEP_SECONDS)
        failed = [i for i, result in enumerate(found) if isinstance(result, Failure)]
        again = loop.run([jobs[i] for i in failed], math.inf, blocking=STEP_SECONDS)
    for i, result in zip(failed, again, strict=True):
        found[i] = result
    return found


class _Table:
    """One environment and the event loop on which its episodes are played."""

    def __init__(self, environment: BudgetEnvironment, seconds: float, pause: float) -> None:
        self.environment = environment
        self._seconds, self._pause = seconds, pause
        self._loop = EpisodeLoop()
        self._closed = threading.Event()

    def __enter__(self) -> _Table:
        self._loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._loop.close()

    def play(self, jobs: Sequence[Job]) -> list[tuple[Job, Driven]]:
        """Each job's episode, lost ones at their second attempt; without those that money or closing cut off."""
        if self._over():
            return []
        played = self._attempt(jobs)
        lost = [job for job in jobs if played[job.key].stop == "lost"]
        if lost and not self._over():
            self._closed.wait(self._pause)
            played |= self._attempt(lost)
        return [(job, played[job.key]) for job in jobs if played[job.key].stop != "lost" or not self._over()]

    def _over(self) -> bool:
        return self._closed.is_set() or self.environment.out_of_money()

    def _attempt(self, jobs: Sequence[Job]) -> dict[str, Driven]:
        begun: dict[str, BudgetEpisode] = {}

        def playing(job: Job) -> Any:
            async def play() -> Driven:
                begun[job.key] = episode = self.environment.episode(job.row, job.seed)
                driven = await drive_episode(self.environment, episode, job.choose, self._seconds)
                cause = _unanswered(episode)
                return driven if cause is None else _lost(cause, driven.columns)

            return play

        def counting(key: str) -> Any:
            async def columns() -> Any:
                return begun[key].columns("lost") if key in begun else {}

            return columns

        ends = dict(zip((job.key for job in jobs), self._run([playing(job) for job in jobs]), strict=True))
        failed = {key: end.cause for key, end in ends.items() if isinstance(end, Failure)}
        for (key, cause), columns in zip(failed.items(), self._run([counting(key) for key in failed]), strict=True):
            ends[key] = _lost(cause, {} if isinstance(columns, Failure) else columns)
        return ends

    def _run(self, jobs: Sequence[Any]) -> list[Any]:
        if self._closed.is_set():
            return [Failure("the phase has ended")] * len(jobs)
        return self._loop.run(jobs, math.inf, blocking=self._seconds)


def _unanswered(episode: BudgetEpisode) -> str | None:
    """Why an episode says nothing about its executors, if so."""
    open_circuit = [error for error in episode.errors if error.startswith(CIRCUIT_OPEN)]
    if open_circuit:
        return f"{_UNANSWERED} for a while: {open_circuit[0]}"
    if episode.errors and len(episode.errors) == len(episode.calls):
        return f"{_UNANSWERED}: {episode.errors[-1]}"
    return None


def _lost(cause: str, columns: Any) -> Driven:
    return Driven(Observation(), (), {**NOTHING, **columns, CORRECT: 0.0, LOST: cause}, "lost")


_table: _Table
"""Of a process that was started to play."""


def _start(make: Callable[[], BudgetEnvironment], seconds: float, pause: float) -> None:
    global _table
    _table = _Table(make(), seconds, pause).__enter__()


def _play(jobs: Sequence[Job]) -> list[tuple[Job, Driven]]:
    return _table.play(jobs)
