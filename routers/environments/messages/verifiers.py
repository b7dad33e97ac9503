"""Environments of Prime Intellect's `verifiers` (MIT): its rollout asks the training server, its rubric scores.

    train_tasks: verifiers:my-env/train              load_environment("my-env"), rows of its dataset
    heldout_tasks: ["verifiers:my-env?max_turns=6/eval"]     with max_turns=6, rows of its eval_dataset

and of verifiers >= 0.4, where a taskset has no splits but arguments (`verifiers_tasksets`):

    train_tasks: verifiers:my-tasks?split=train/tasks
    heldout_tasks: ["verifiers:my-tasks?split=test&agent.max_turns=6/tasks"]

verifiers cannot be installed beside this library: 0.3 wants mcp < 2, 0.4 openai < 3, and vLLM, which we train with,
neither. So it has a Python of its own, named by VERIFIERS_PYTHON, in one process of which all rollouts run
(`verifiers_worker`); what they share with the training is OpenAI's API, at an address per episode:

    python -m venv verifiers-env && verifiers-env/bin/pip install "verifiers>=0.1.14,<0.5" uv my-env
    export VERIFIERS_PYTHON=$PWD/verifiers-env/bin/python

A rubric's reward may be any number: say what it may be with ``?worst=-1&best=2``, unless it is from 0 to 1.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from routers.environments.messages import verifiers_worker
from routers.environments.messages.named import Scale
from routers.environments.messages.served import ServedAgent
from routers.environments.protocol import GameError

PYTHON = "VERIFIERS_PYTHON"


class Worker:
    """The process that verifiers runs in; started again for the first request after its end.

    Args:
        python: the interpreter that verifiers is installed in.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: dict[int, Future[Any]] = {}

    def ask(self, *request: Any) -> Any:
        """The answer to a request, from any thread.

        Raises:
            RuntimeError: it is an error, or the process has ended.
        """
        number, answer = next(self._numbers), Future[Any]()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            self._asked[number] = answer
            try:
                self._process.stdin.write(json.dumps([number, *request]).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:  # it has just ended; who reads its answers says so
                pass
        return answer.result()

    def _start(self) -> None:
        words = tempfile.TemporaryFile()  # noqa: SIM115  what verifiers logs, and says when it breaks
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        kept["PATH"] = os.pathsep.join([os.path.dirname(self._python), kept.get("PATH", os.defpath)])  # uv's, for 0.4
        try:
            process = subprocess.Popen(
                [self._python, "-I", verifiers_worker.__file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=kept,
            )  # fmt: skip
        except OSError as error:
            raise GameError(f"{PYTHON}={self._python} cannot be run: {error.strerror}") from None
        self._process, self._asked = process, {}
        threading.Thread(
            target=self._read, args=(process, words, self._asked), name="srpo-verifiers", daemon=True
        ).start()

    def _read(self, process: subprocess.Popen[bytes], words: Any, asked: dict[int, Future[Any]]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            number, result = json.loads(line)
            if "error" in result:
                asked.pop(number).set_exception(RuntimeError(f"verifiers: {result['error']}"))
            else:
                asked.pop(number).set_result(result["result"])
        process.wait()
        with words, self._lock:
            size = os.fstat(words.fileno()).st_size
            last = os.pread(words.fileno(), 1000, max(0, size - 1000)).decode(errors="replace").strip()
            for answer in asked.values():
                answer.set_exception(RuntimeError(f"verifiers' process has ended; its last words: {last}"))
            asked.clear()

    def close(self) -> None:
        """End the process and its rollouts."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


@functools.cache
def worker(python: str) -> Worker:
    """The one worker of this process for an interpreter; closed at exit."""
    made = Worker(python)
    atexit.register(made.close)
    return made


class VerifiersAgent(ServedAgent):
    """An environment of verifiers as an `Agent`. Splits: `train`, and `eval` where it has an eval_dataset; a
    taskset has one, `tasks`.

    Args:
        name: of the environment: a module of that Python, or of the folder that the training runs in.
        arguments: of its `load_environment`, or of verifiers' configuration.
        scale: what its rewards are worth.

    Raises:
        GameError: no VERIFIERS_PYTHON.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], scale: Scale) -> None:
        if not (python := os.environ.get(PYTHON)):
            raise GameError(
                f"verifiers:{name} needs {PYTHON}: the Python of an environment with verifiers>=0.1.14,<0.5, which "
                "cannot be installed beside this library"
            )
        super().__init__(self._play, {})
        self._name, self._arguments, self._scale = name, dict(arguments), scale
        self._worker = worker(python)

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        if not self._splits:
            try:
                kinds = self._worker.ask("tasks", self._name, self._arguments)
            except RuntimeError as error:
                raise GameError(str(error)) from None
            self._splits = {
                name: {f"{name}-{row}": kind for row, kind in enumerate(found)} for name, found in kinds.items()
            }
        return super().tasks(split, count)

    def _play(self, base_url: str, task: str) -> float:
        split, _, row = task.rpartition("-")
        return self._scale.score(self._worker.ask("play", self._name, self._arguments, split, int(row), base_url))
