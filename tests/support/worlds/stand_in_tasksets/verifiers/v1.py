"""The stack of verifiers >= 0.4: tasks are typed, a program asks the model, and asks again where a call failed."""

import importlib
import importlib.util
import json
import typing
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

A, B = TypeVar("A"), TypeVar("B")


class _Fields:
    def __init__(self, **given: Any) -> None:
        known = typing.get_type_hints(type(self))
        if unknown := set(given) - set(known):
            raise ValueError(f"{sorted(unknown)[0]}: extra inputs are not permitted")
        for name in known:
            setattr(self, name, given[name] if name in given else getattr(type(self), name))


class TasksetConfig(_Fields):
    id: str = ""
    task: Any = None


class TaskData(_Fields):
    prompt: str = ""


class Task(Generic[A]):
    def __init__(self, data: Any, config: Any) -> None:
        self.data, self.config = data, config


class Taskset(Generic[A, B]):
    bounded: Any = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def __iter__(self) -> Any:
        return iter(self.load())  # type: ignore[attr-defined]


class Trace:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.assistant_messages: list[Any] = []
        self.errors: list[Any] = []
        self.reward = 0.0


def reward(function: Any) -> Any:
    function.is_reward = True
    return function


class ModelContext(SimpleNamespace): ...


class EvalClientConfig(SimpleNamespace): ...


class SingleAgentEnvConfig(SimpleNamespace): ...


def default_harness_id(name: str) -> str:
    return "bash"


def env_config_type(name: str, env: str) -> Any:
    return SingleAgentEnvConfig if not env else SimpleNamespace


def _taskset(name: str) -> Any:
    module = importlib.import_module(name.replace("-", "_"))
    return getattr(module, module.__all__[0])


def resolve_env_config(given: dict[str, Any]) -> Any:
    assert given["agent"]["runtime"] == {"type": "subprocess"} and given["agent"]["harness"] == {"id": "null"}
    kind = _taskset(given["taskset"]["id"]).__orig_bases__[0].__args__[1]
    config = SingleAgentEnvConfig(agent=given["agent"], taskset=kind(**given["taskset"]))
    return config


def load_environment(config: Any) -> Any:
    return _Environment(config)


class _Environment:
    def __init__(self, config: Any) -> None:
        self.config, self._serves = config, False
        self.taskset = _taskset(config.taskset.id)(config.taskset)

    @asynccontextmanager
    async def serving(self) -> Any:
        self._serves = True
        yield
        self._serves = False

    async def run_episode(self, task: Any, asked: Any) -> Any:
        import asyncio

        assert self._serves
        trace = Trace()
        path, _, name = next(iter(task.config["stops"].values()))["fn"].rpartition(":")
        spec = importlib.util.spec_from_file_location("plugged", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        stop = getattr(module, name)
        assert typing.get_type_hints(stop)["trace"] is Trace, "verifiers gives a stop what its annotation names"
        for _ in range(3):
            if stop(trace):
                break
            error = await asyncio.to_thread(self._ask, asked, task.data.prompt, trace)
            trace.calls.append(SimpleNamespace(error=error))
            if error is None:
                break
        rewards = [getattr(task, name) for name in dir(task) if getattr(getattr(task, name), "is_reward", False)]
        try:
            trace.reward = sum([await function(trace) for function in rewards])
        except Exception as error:
            trace.errors.append(SimpleNamespace(type="TaskError", message=f"{type(error).__name__}: {error}"))
        return SimpleNamespace(ok=not trace.errors, errors=[], traces=[trace])

    def _ask(self, asked: Any, prompt: str, trace: Trace) -> str | None:
        body = {"model": asked.model, "messages": [{"role": "user", "content": prompt}]}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{asked.client.base_url}/chat/completions", json.dumps(body).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                message = json.load(reply)["choices"][0]["message"]
        except urllib.error.HTTPError as error:
            return str(error)
        trace.assistant_messages.append(SimpleNamespace(content=message["content"]))
        return None
