"""AppWorld (Trivedi et al. 2024, arXiv 2407.18901, package `appworld`, Apache-2.0) as an agent environment: apps to be
operated by Python code that a language model writes.

Optional, and in an environment of its own, since it needs pydantic 1 and freezes the clock of its process:

    python -m venv appworld-env && appworld-env/bin/pip install appworld
    appworld-env/bin/appworld install
    appworld-env/bin/appworld download data --root FOLDER
    export APPWORLD_PYTHON=$PWD/appworld-env/bin/python APPWORLD_ROOT=FOLDER

Written against 0.1.3.post1, and tested with its engine, apps and evaluator on a small world of our own: AppWorld's
data was not within reach, so no task of its own has ever been run here.
"""

import json
import os
import subprocess
import sys
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from routers.environments.appworld.server import ANSWER_SECONDS, START_SECONDS, Connection, Server
from routers.environments.protocol import GameError

INSTALL = (
    "install it into an environment of its own: python -m venv appworld-env && appworld-env/bin/pip install appworld; "
    "appworld-env/bin/appworld install; appworld-env/bin/appworld download data --root FOLDER; then set "
    "APPWORLD_PYTHON to appworld-env/bin/python and APPWORLD_ROOT to FOLDER"
)
HOW = """\
An action is Python code in one fenced block (```python), and nothing after it. It runs in a shell that keeps its \
variables; you see what it prints, so print what you need to know.
The apps are api_docs, supervisor, amazon, phone, file_system, spotify, venmo, gmail, splitwise, simple_note and \
todoist. Their APIs are called with keyword arguments: apis.APP.API(name=value). Look them up before you use them:
print(apis.api_docs.show_api_descriptions(app_name="spotify"))
print(apis.api_docs.show_api_doc(app_name="spotify", api_name="login"))
Your supervisor's passwords, addresses and payment cards are in the supervisor app, for example \
apis.supervisor.show_account_passwords(); the login API of an app gives the access_token that its other APIs want. \
Long lists come in pages: read all of them (page_index).
Decide by yourself, nobody answers questions. When the task is done, call apis.supervisor.complete_task(), with \
answer=... if the task asks for something; if it cannot be done, call it with status="fail"."""


class AppWorldBenchmark:
    """AppWorld's tasks by data set (`train`, `dev`, `test_normal`, `test_challenge`); a `Benchmark`.

    Types are the difficulties in AppWorld's tables, 1 to 3. They come with the solutions: episodes do not tell them.

    Every open episode is a process: with the small world of our tests 90 MB of its own and half a second to start;
    AppWorld's own databases are larger.

    Raises:
        ImportError: AppWorld, its apps or its data are not there.
    """

    def __init__(self) -> None:
        root = Path(os.environ.get("APPWORLD_ROOT", ".")).resolve()
        python = os.environ.get("APPWORLD_PYTHON", sys.executable)
        _check(python, root)
        self._data = root / "data"
        self._server = Server(python, root)

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        known = sorted(path.stem for path in (self._data / "datasets").glob("*.txt"))
        if which not in known:
            raise GameError(f"AppWorld has no data set {which!r}; there are {', '.join(known)}")
        lines = (self._data / "datasets" / f"{which}.txt").read_text(encoding="utf-8").split()
        tasks = [line.split(":")[0] for line in lines]  # behind a colon: a tag
        truth = "ground_truth/metadata.json"
        return {task: f"difficulty {self._read(task, truth)['difficulty']}" for task in tasks[: count or None]}

    def make(self, task: str, limit: int) -> "AppWorld":
        return AppWorld(self._server, task, self._read(task, "specs.json"), limit)

    def close(self) -> None:
        self._server.close()

    def _read(self, task: str, name: str) -> dict[str, Any]:
        path = self._data / "tasks" / task / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise GameError(f"AppWorld has no task {task!r}: {error}") from error
        return found


class AppWorld:
    """One task; an `AgentEnvironment` whose actions are Python code.

    It ends when the agent calls `complete_task`, or at the limit. Then AppWorld's tests of the task are run on what
    the episode left behind: score 1 if all pass (task goal completion, TGC), else 0. An episode that is stopped
    before, by a budget for example, scores 0.

    Raises:
        RuntimeError, TimeoutError: in `reset` or `step`, when the world's process has died or hangs: it is lost.
    """

    admissible: tuple[str, ...] = ()
    how = HOW
    waits = True
    task_type = "appworld"

    def __init__(self, server: Server, task: str, specs: dict[str, Any], limit: int = 40) -> None:
        if limit < 1:
            raise GameError(f"{task}: the step limit is {limit}; it must be at least 1")
        self._server, self._specs = server, specs
        self.seed, self.task, self.limit = task, str(specs["instruction"]), limit
        self.steps, self.won, self.done = 0, False, False
        self._world: Connection | None = None
        self._started: dict[str, Any] = {}

    @property
    def score(self) -> float:
        return float(self.won)

    def reset(self) -> str:
        if self._world is not None:
            raise GameError(f"{self.seed}: an episode object is played once; make a new one")
        self._world = self._server.open()
        self._world.send("start", self.seed)  # it starts while others are asked for
        weakref.finalize(self, self._world.close)
        who, now = self._specs["supervisor"], datetime.fromisoformat(self._specs["datetime"])
        return (
            f"You act for {who['first_name']} {who['last_name']} (email {who['email']}, phone {who['phone_number']}), "
            f"your supervisor. It is {now:%A, %Y-%m-%d %H:%M}.\n\nYour task is to: {self.task}"
        )

    def step(self, action: str) -> tuple[str, bool]:
        if self._world is None or self.done:
            raise GameError(f"{self.seed}: step() {'after the end' if self._world else 'before reset()'}")
        self._started = self._started or self._world.receive(START_SECONDS)
        self.steps += 1
        answer = self._world.ask("execute", action, seconds=ANSWER_SECONDS, pid=self._started["pid"])
        self.done = answer["completed"] or self.steps >= self.limit
        if self.done:
            self.won = self._evaluate()
            self._world.close()
        return answer["output"], self.done

    def _evaluate(self) -> bool:
        judge = self._server.open()
        try:
            return bool(judge.ask("evaluate", self.seed, self._started["folder"], seconds=START_SECONDS))
        finally:
            judge.close()


def _check(python: str, root: Path) -> None:
    # Where the package lies is found without importing it, which takes seconds.
    find = "import importlib.util as u; print(getattr(u.find_spec('appworld'), 'origin', None) or '')"
    try:
        package = subprocess.run([python, "-I", "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImportError(f"APPWORLD_PYTHON={python} cannot be run ({error}); {INSTALL}") from error
    if not package:
        raise ImportError(f"AppWorld is not installed for {python}; {INSTALL}")
    if not Path(package).with_name("apps").joinpath("supervisor").is_dir():
        raise ImportError(f"AppWorld's apps are not unpacked ({python} -m appworld.cli install); {INSTALL}")
    if not (root / "data" / "tasks").is_dir():
        raise ImportError(f"there is no AppWorld data in APPWORLD_ROOT={root}; {INSTALL}")
