"""A run's pushes: each is `srpo push` in a process of its own, one after the other, while the training goes on.

So nothing of the Hub, of its client or of its native uploader can hold up a run or end it, and what did not arrive is
finished by the very command that was begun.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from srpo.hub.push import BYTES_PER_SECOND
from srpo.hub.upload import DEADLINE
from srpo.losses import note

logger = logging.getLogger(__name__)

_SLACK = 30.0
"""Seconds after its deadline in which a push must have ended itself."""


@dataclass(frozen=True)
class Push:
    """One push.

    Args:
        folder: as a person names it.
        repo_id: `name` or `owner/name`.
        options: further words of `srpo push`.
        staged: where the same files lie until it is done; None: in `folder`.
        step: of the optimiser.
        token: given to the process in its environment, never on a command line.
        deadline: seconds (`srpo push --deadline`).
    """

    folder: str
    repo_id: str
    options: tuple[str, ...] = ()
    staged: str | None = None
    step: int = 0
    token: str | None = field(default=None, repr=False)
    deadline: float = DEADLINE

    @property
    def command(self) -> str:
        """What finishes it by hand."""
        return shlex.join(["srpo", "push", self.folder, self.repo_id, *self.options])


def repository(args: Any) -> str:
    """Of a run; without an owner it is the logged-in user's."""
    return str(args.hub_model_id or Path(args.output_dir).absolute().name)


def push_of(
    args: Any,
    repo_id: str,
    folder: str,
    *options: str,
    also: Sequence[str] = (),
    staged: str | None = None,
    step: int = 0,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    deadline: float | None = None,
) -> Push:
    """A push of a run, as its configuration says it; what is given here goes before that.

    Args:
        args: the run's configuration.
        repo_id, folder: where to, and what.
        options: further words of `srpo push`.
        also: names of further files of the folder.
        staged, step: as in `Push`.
        token, revision, private, deadline: as `srpo push` has them; None: as `args` say.
    """
    if args.hub_private_repo if private is None else private:
        options += ("--private",)
    if (branch := revision or args.hub_revision) is not None:
        options += (f"--revision={branch}",)
    if also:
        options += ("--also", *also)
    seconds = args.hub_deadline if deadline is None else deadline
    return Push(folder, repo_id, options, staged, step, token or args.hub_token, seconds)


class Pushes:
    """The pushes of one run.

    Args:
        output: folder of the run, where failures are noted.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._last: Thread | None = None

    def now(self, push: Push) -> str | None:
        """Push, and wait for it; what it printed, or None where it failed, which is told and noted."""
        self.wait_until_done()
        return self._pushed(push)

    def later(self, push: Push, then: Callable[[], object] | None = None) -> None:
        """Push after those that are under way; `then` is called in any case."""
        before = self._last

        def work() -> None:
            if before is not None:
                before.join()
            try:
                self._pushed(push)
            finally:
                if then is not None:
                    then()

        self._last = Thread(target=work, daemon=True, name="hub")
        self._last.start()

    def is_done(self) -> bool:
        return self._last is None or not self._last.is_alive()

    def wait_until_done(self, seconds: float | None = None) -> bool:
        """Wait, at most so many seconds; whether all are done."""
        if self._last is not None:
            self._last.join(seconds)
        return self.is_done()

    def _pushed(self, push: Push) -> str | None:
        try:
            said, why = run(push)
        except OSError as error:
            said, why = None, f"its process could not be started: {error}"
        if said is None:
            logger.warning(
                "The push of %s failed: %s. Nothing else is lost. By hand: %s", push.folder, why, push.command
            )
            note(self._output, push.step, "pushes", {why: 1})
        return said


def run(push: Push) -> tuple[str | None, str]:
    """What it printed, or None and why it failed."""
    folder = Path(push.staged or push.folder)
    words = [str(folder), push.repo_id, *push.options, f"--deadline={push.deadline:g}"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RANK": "0"}
    if push.token:
        environment["HF_TOKEN"] = push.token
    most = push.deadline + _bytes(folder) / BYTES_PER_SECOND + _SLACK
    process = subprocess.Popen(
        [sys.executable, "-m", "srpo.hub.push", *words],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # a Ctrl-C is told to the run, which ends its processes
    )  # fmt: skip
    try:
        out, told = process.communicate(timeout=most)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, "its process did not end and was killed"
    if process.returncode == 0:
        return out.strip(), ""
    lines = [line.partition(": ")[2] for line in told.splitlines() if line.startswith(("error: ", "STOPPED: "))]
    return None, [f"exit code {process.returncode}", *told.splitlines()[-1:], *lines][-1]


def _bytes(folder: Path) -> int:
    """At least what a push of it sends. The run may take files away meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size
    return size
