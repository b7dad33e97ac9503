"""In AppWorld's place where it is not installed, for tests of what is ours: processes, connections, time limits.

`install` makes a package `appworld` of it, and a command that runs Python with that package. Actions are Python here
too; the only app is `supervisor`, and a task is done right if `done.txt` says "right" when it is evaluated.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path()
if __name__ == "appworld":
    os.environ["KEY_OF_A_FILE"] = "secret"  # AppWorld reads .env files


def install(folder: Path) -> Path:
    package = folder / "site" / "appworld"
    (package / "apps" / "supervisor").mkdir(parents=True)
    (package / "__init__.py").write_text(Path(__file__).read_text(encoding="utf-8"))
    (package / "apps" / "__init__.py").write_text("def get_all_apps():\n    return ['supervisor']\n")
    for name in ("__init__", "models", "apis"):
        (package / "apps" / "supervisor" / f"{name}.py").touch()
    command = folder / "python"
    # The first argument is -I, with which PYTHONPATH would mean nothing.
    command.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={folder}/site exec {sys.executable} -P "$@"\n')
    command.chmod(0o755)
    return command


def make_data(folder: Path) -> None:
    """Two tasks, as AppWorld's data has them."""
    specs = {
        "instruction": "Do it right.",
        "supervisor": {"first_name": "Ada", "last_name": "Berg", "email": "ada@example.com", "phone_number": "555"},
        "datetime": "2023-05-18T12:00:00",
    }
    for difficulty, name in enumerate(("abc1234_1", "abc1234_2"), start=1):
        task = folder / "data" / "tasks" / name
        (task / "ground_truth").mkdir(parents=True)
        (task / "specs.json").write_text(json.dumps(specs))
        (task / "ground_truth" / "metadata.json").write_text(json.dumps({"difficulty": difficulty}))
    (folder / "data" / "datasets").mkdir()
    (folder / "data" / "datasets" / "train.txt").write_text("abc1234_1\nabc1234_2\n")
    (folder / "data" / "datasets" / "dev.txt").write_text("abc1234_2:tagged\n")


def update_root(root: str) -> None:
    global ROOT
    ROOT = Path(root)


class AppWorld:
    def __init__(self, task_id: str, experiment_name: str, timeout_seconds: int, load_ground_truth: bool) -> None:
        assert (ROOT / "data" / "tasks" / task_id).is_dir() and not load_ground_truth, task_id
        self.completed = False
        self.environment_io: list[dict[str, str]] = []
        self.names: dict[str, Any] = {"apis": SimpleNamespace(supervisor=self)}

    def complete_task(self) -> None:
        self.completed = True

    def task_completed(self) -> bool:
        return self.completed

    def execute(self, code: str) -> str:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                exec(code, self.names)
        except Exception as error:
            return f"Execution failed. Traceback:\n{error}"
        return said.getvalue() or "Execution successful."


def evaluate_task(task_id: str, experiment_name: str) -> Any:
    done = ROOT / "done.txt"
    return SimpleNamespace(success=done.is_file() and done.read_text() == "right")
