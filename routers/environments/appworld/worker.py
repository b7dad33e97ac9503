"""AppWorld's side of `appworld_server`, run by the Python that AppWorld is installed in: no package of ours is there.

    python -I appworld_worker.py CONTROL FOLDER

CONTROL is the number of an open socket; what worlds write goes to FOLDER; `data` lies in APPWORLD_ROOT.

AppWorld is imported once, which takes long; then every file descriptor that comes through CONTROL is a socket to
serve, and gets a forked process of its own (AppWorld keeps one world per process: it freezes the process's clock).
When CONTROL is closed, everything ends. Requests and answers are lines of JSON:

    ["start", task]         -> {"pid": of the process, "folder": what it writes to}; then, as often as wanted,
    ["execute", code]       -> {"output": text, "completed": whether the agent has said that the task is complete}
    ["evaluate", task, folder of the world's process] -> whether the task's goal was completed (TGC), from what that
                               process saved; asked of a process that has run no code of a model

or {"error": words}. Code is a language model's. It runs under AppWorld's guards, which keep a careless program from
harm; they are no wall against a hostile one, which can read this user's files: such models belong into a container.
"""

import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

CODE_SECONDS = 30
"""After so long AppWorld stops an action and says so (its own default is 100)."""
OUTPUT_CHARACTERS = 100_000
KEPT = {"APPWORLD_ROOT", "APPWORLD_CACHE", "LANG", "PATH"}
EXPERIMENT = "srpo"


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # a run that is told to end needs its worlds still
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as control:
        _import()
        folder = sys.argv[2]
        os.environ.update(HOME=folder, IPYTHONDIR=folder)
        data = Path(os.environ["APPWORLD_ROOT"], "data").resolve()
        try:
            while connections := socket.recv_fds(control, 1, 1)[1]:
                try:
                    if not _gone(connections[0]) and os.fork() == 0:
                        control.close()
                        _serve(socket.socket(fileno=connections[0]), folder, data)
                except OSError as error:  # no memory, or no processes: that world is lost, the others go on
                    print(error, file=sys.stderr, flush=True)
                os.close(connections[0])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)  # this process too, and every world


def _import() -> None:
    """All that a world imports: 15 s of work that its process then need not do, and memory that all share."""
    apps = importlib.import_module("appworld.apps").get_all_apps()
    for module in ("appworld", *(f"appworld.apps.{app}.{part}" for app in apps for part in ("models", "apis"))):
        importlib.import_module(module)
    for name in set(os.environ) - KEPT:  # AppWorld reads .env files of folders above it
        del os.environ[name]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the worlds' processes
    gc.freeze()


def _serve(connection: socket.socket, parent: str, data: Path) -> None:
    folder = ""
    try:  # whatever happens, this process must not return into the server's code
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        folder = tempfile.mkdtemp(dir=parent)
        os.chdir(folder)
        os.symlink(data, "data")  # AppWorld writes beside its data, by the task's name: a task is played many times
        worker = _Worker(folder)
        for line in connection.makefile("rb"):
            if _gone(connection.fileno()):
                break
            try:
                name, *arguments = json.loads(line)
                answer = {"result": getattr(worker, name)(*arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            connection.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _gone(connection: int) -> bool:
    """Whether nobody waits for an answer: an episode that was made for its first words only costs no world."""
    poll = select.poll()
    poll.register(connection, 0)  # the end of the other side is reported always
    return bool(poll.poll(0))


class _Worker:
    """The requests."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.world: Any = None

    def start(self, task: str) -> dict[str, Any]:
        appworld = importlib.import_module("appworld")
        appworld.update_root(self.folder)
        self.world = appworld.AppWorld(
            task_id=task, experiment_name=EXPERIMENT, timeout_seconds=CODE_SECONDS, load_ground_truth=False
        )
        return {"pid": os.getpid(), "folder": self.folder}

    def execute(self, code: str) -> dict[str, Any]:
        try:
            output = self.world.execute(code)
        except Exception as error:  # code that AppWorld cannot even read, such as a null character
            output = f"Execution failed. Traceback:\n{type(error).__name__}: {error}"
        for entry in self.world.environment_io[-1:]:  # written to a file with all before it, at every step from now on
            entry.update({name: text.encode(errors="replace").decode() for name, text in entry.items()})
        return {"output": output[:OUTPUT_CHARACTERS], "completed": self.world.task_completed()}

    def evaluate(self, task: str, folder: str) -> bool:
        appworld = importlib.import_module("appworld")
        appworld.update_root(folder)
        return bool(appworld.evaluate_task(task, EXPERIMENT).success)


if __name__ == "__main__":
    main()
