"""verifiers' side of `verifiers`, run by the Python that verifiers is installed in: no package of ours is there.

    python -I verifiers_worker.py          in the folder where modules of environments may lie

Requests are lines of JSON on stdin, answered on stdout in any order, each by its number:

    [n, "tasks", id, arguments]                              -> {split: type of each task}
    [n, "play", id, arguments, split, row, base URL]         -> the rubric's reward

or {"error": words}. When stdin ends, everything ends.
"""

import asyncio
import functools
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_broken: ContextVar[list[str]] = ContextVar("broken")
"""What reward functions raised in this rollout."""


class _Words(logging.Handler):
    """Of a reward function that raises, verifiers makes a 0 and a line of its log: this line."""

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("Error calling reward function"):
            _broken.get([]).append(text)


class Environments:
    """Of verifiers below 0.4: those that were asked for, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._words = _Words()

    def _load(self, name: str, arguments: dict[str, Any]) -> Any:
        key = json.dumps([name, arguments])
        if key not in self._loaded:
            made = importlib.import_module("verifiers").load_environment(name, **arguments)
            if made.requires_group_rollouts:
                raise ValueError(f"{name} scores groups of rollouts together; here each is scored by itself")
            self._loaded[key] = made
        logging.getLogger("verifiers").addHandler(self._words)  # again: its import, and its users, clear the handlers
        return self._loaded[key]

    def _rows(self, environment: Any, split: str) -> Any:
        """The dataset of a split; None: there is none. Asked for held-out rows, verifiers would give training rows."""
        return environment.build_dataset() if split == "train" else environment.build_eval_dataset()

    async def tasks(self, name: str, arguments: dict[str, Any]) -> dict[str, list[str]]:
        environment, found = self._load(name, arguments), {}
        for split in ("train", "eval"):
            if (rows := self._rows(environment, split)) is not None:
                infos = rows["info"] if "info" in rows.column_names else [None] * len(rows)
                found[split] = [_kind(info) or name for info in infos]
        return found

    async def play(self, name: str, arguments: dict[str, Any], split: str, row: int, base_url: str) -> float:
        environment, api = self._load(name, arguments), importlib.import_module("openai").AsyncOpenAI
        client_of = importlib.import_module("verifiers.clients").OpenAIChatCompletionsClient
        broken: list[str] = []
        _broken.set(broken)
        # A call waits for its decision as long as that takes, and is not made twice: each is a step of the episode.
        async with api(base_url=base_url, api_key="none", timeout=None, max_retries=0) as client:
            asked = dict(self._rows(environment, split)[row])
            played = await environment.run_rollout(asked, client_of(client), "router", {})
        if error := str(played.get("error") or ""):
            if "ModelError" not in error and "OverlongPrompt" not in error:
                raise RuntimeError(f"the rollout failed: {error}")
        elif broken:
            raise RuntimeError(broken[0])
        return float(played["reward"])  # of what there is, where a member failed or the steps were used up


@functools.cache
def _side() -> Any:
    """Who answers for the verifiers that is installed."""
    if hasattr(importlib.import_module("verifiers"), "load_environment"):
        return Environments()
    beside = Path(__file__).with_name("verifiers_tasksets.py")  # by its path: beside it lie names of other packages
    spec = importlib.util.spec_from_file_location(beside.stem, beside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tasksets()


def _kind(info: Any) -> str | None:
    """Which environment of a group the row is for."""
    told = json.loads(info) if isinstance(info, str) else info
    kind = told.get("env_id") if isinstance(told, dict) else None
    return kind if isinstance(kind, str) else None


async def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the run is told, and ends this process
        signal.signal(number, lambda *_: None)
    # The protocol keeps the two streams; what environments print goes to stderr.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())
    running = set()

    async def answer(number: int, what: str, *arguments: Any) -> None:
        try:
            result = {"result": await getattr(_side(), what)(*arguments)}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps([number, result]).encode() + b"\n")
        answers.flush()

    while line := await asyncio.to_thread(requests.readline):
        task = asyncio.create_task(answer(*json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    os._exit(0)  # whatever still runs


if __name__ == "__main__":
    asyncio.run(main())
