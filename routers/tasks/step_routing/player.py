"""Episodes that rules play, as jobs with names: many at once, in this process or in others, each at its own risk.

What may go wrong, and what it costs:

    the world or an executor raises, or a step takes too long     that episode is lost, and played again with the same
    no call of an episode was answered, or a circuit was open     seed; lost again, it counts as failed, at its cost
    episodes of STREAK different tasks in a row are lost          the phase stops; what is finished is kept
    the run's money does not pay for a call                       the same; that episode does not count as failed

A call that fails within an episode is none of these: it is a wasted step that costs what was billed.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routers.tasks.step_routing.environment import TASK, UNANSWERED, Choose, StepRoutingEnvironment
from srpo.rollout.loop import Limits, play
from srpo.rollout.worker_loop import EpisodeLoop, Failure
from srpo.types import CORRECT, COST, LOST, Observation, Row, Stop, Stopped, Trajectory

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


@dataclass(frozen=True)
class Job:
    """One episode to play."""

    key: str
    """Names it among the jobs of a file."""
    row: Row
    seed: str
    choose: Choose


@dataclass(frozen=True)
class Driven:
    """An episode that a routing rule played instead of a policy."""

    decisions: tuple[tuple[str, Observation], ...]
    """(name of the executor, what the policy would have been told after its step); the last observation ends it. None
    of a lost episode."""
    columns: Mapping[str, Any]
    stop: Stop


PlayAll = Callable[[Sequence[Job]], Iterable[tuple[Job, Driven]]]
"""Plays jobs and yields each as it ends, in any order. The same job gives the same episode, where executors do."""


def play_jobs(jobs: Sequence[Job], path: Path, play: PlayAll, keep: Callable[[Driven], Any]) -> list[Any]:
    """What `keep` (JSON-able) makes of every job's episode, in the order of the jobs.

    A finished job is a line of `path`, at once; a later call goes on from there, whatever ended the one before.

    Raises:
        ValueError: two jobs have the same key.
    """
    if len({job.key for job in jobs}) < len(jobs):
        raise ValueError("two jobs have the same key")
    done = _finished(path)
    if todo := [job for job in jobs if job.key not in done]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as lines:
            for job, driven in play(todo):
                done[job.key] = keep(driven)
                lines.write(json.dumps([job.key, done[job.key]]) + "\n")
                lines.flush()
    return [done[job.key] for job in jobs]


def _finished(path: Path) -> dict[str, Any]:
    """Lines by key; a last line that was cut off in the middle counts as not finished, and is removed."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return dict(json.loads(line) for line in whole.splitlines())


def drive(
    environment: StepRoutingEnvironment,
    jobs: Sequence[Job],
    loop: EpisodeLoop | None = None,
    seconds: float = STEP_SECONDS,
) -> list[Driven]:
    """Every job's episode, in their order; a step that takes more than `seconds` loses its episode."""

    def rule(number: int, episode: Any) -> str:
        now = episode.situation
        return environment.labels[jobs[number].choose(now, now.affordable)]

    limits = Limits(turns=10**6, tokens=1, observation_tokens=0, step_seconds=seconds)
    rows, seeds, nothing = [job.row for job in jobs], [job.seed for job in jobs], [()] * len(jobs)
    found = play(environment, rows, nothing, seeds, rule, None, limits, loop)
    return [
        Driven((), failed(t), "lost")
        if t.stop == "lost"
        else Driven(tuple((environment.names[label], told) for label, told in t.said), t.columns, t.stop)
        for t in found
    ]


def failed(lost: Trajectory) -> dict[str, Any]:
    """Columns of a lost episode that counts as failed, at its cost."""
    return {**NOTHING, **{key: value for key, value in lost.columns.items() if value is not None}, CORRECT: 0.0}


class Player:
    """Plays jobs (`PlayAll`).

    Args:
        make: the environment. Called once per process; it must be picklable where there are several.
        processes: for executors that compute.
        threads: for executors that wait: so many episodes at once, in one event loop; 0: they do not wait.
        seconds: of one step.
        pause: seconds before a lost episode is played again.

    Raises:
        PhaseStopped: see above; raised while results are taken.
    """

    def __init__(
        self,
        make: Callable[[], StepRoutingEnvironment],
        *,
        processes: int = 1,
        threads: int = 0,
        seconds: float = STEP_SECONDS,
        pause: float = 0.0,
    ) -> None:
        self._make = make
        self._processes, self._threads, self._seconds, self._pause = processes, threads, seconds, pause

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Driven]]:
        # Computed episodes take their turns together; those that wait go on as soon as their own answer is there.
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
    """Hold lost episodes back until another one has worked: in a streak it is not the executors that failed."""
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
    unanswered = [driven for _, driven in held if driven.columns[LOST].startswith(UNANSWERED)]
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


def twice(jobs: Sequence[Callable[[], Coroutine[Any, Any, Any]]]) -> list[Any]:
    """Results of short jobs that may raise or hang, at their second attempt where the first failed; a `Failure` for
    each that failed again."""
    with EpisodeLoop() as loop:
        found = loop.run(jobs, STEP_SECONDS)
        failed = [i for i, result in enumerate(found) if isinstance(result, Failure)]
        again = loop.run([jobs[i] for i in failed], STEP_SECONDS)
    for i, result in zip(failed, again, strict=True):
        found[i] = result
    return found


class _Table:
    """One environment and the event loop on which its episodes are played."""

    def __init__(self, environment: StepRoutingEnvironment, seconds: float, pause: float) -> None:
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
            if not self._over():
                played |= self._attempt(lost)
        return [(job, played[job.key]) for job in jobs if played[job.key].stop != "lost" or not self._over()]

    def _attempt(self, jobs: Sequence[Job]) -> dict[str, Driven]:
        found = drive(self.environment, jobs, self._loop, self._seconds)
        return {job.key: driven for job, driven in zip(jobs, found, strict=True)}

    def _over(self) -> bool:
        return self._closed.is_set() or self.environment.out_of_money()


_table: _Table
"""Of a process that was started to play."""


def _start(make: Callable[[], StepRoutingEnvironment], seconds: float, pause: float) -> None:
    global _table
    _table = _Table(make(), seconds, pause).__enter__()


def _play(jobs: Sequence[Job]) -> list[tuple[Job, Driven]]:
    return _table.play(jobs)
