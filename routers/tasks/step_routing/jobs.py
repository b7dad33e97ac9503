"""Episodes that rules play, as jobs with names: what was played is kept as it ends, and is not played again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routers.tasks.step_routing.environment import Choose, Driven
from srpo.types import Row


@dataclass(frozen=True)
class Job:
    """One episode to play."""

    key: str
    """Names it among the jobs of a file."""
    row: Row
    seed: str
    choose: Choose


PlayAll = Callable[[Sequence[Job]], Iterable[tuple[Job, Driven]]]
"""Plays jobs and yields each as it ends, in any order. The same job gives the same episode, where executors do."""


def play_jobs(jobs: Sequence[Job], path: Path, play: PlayAll, keep: Callable[[Driven], Any]) -> list[Any]:
    """What `keep` (JSON-able) makes of every job's episode, in the order of the jobs.

    A finished job is a line of `path`, at once; a later call goes on from there, whatever ended the one before. The
    caller removes the file once it has put the results into their place.

    Raises:
        ValueError: two jobs have the same key.
    """
    if len({job.key for job in jobs}) < len(jobs):
        raise ValueError("two jobs have the same key")
    done = _finished(path)
    todo = [job for job in jobs if job.key not in done]
    if todo:
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
