"""The side of verifiers >= 0.4 of `verifiers_worker`: a taskset, played by one agent in a program of verifiers' own.

Arguments are paths of verifiers' configuration of an environment (``agent.max_turns=5``, ``env.id=...``); without a
dot they are the taskset's (``split=test``). Unless told otherwise the agent is the taskset's own harness or ``null``,
verifiers' loop of chat and tools, and runs on this machine (``agent.runtime.type=docker``: in a container).
"""

import json
from typing import Any

import verifiers.v1 as vf

PART = "tasks"
"""A taskset has no splits; which rows it loads is an argument of its own."""


def member_failed(trace: vf.Trace) -> bool:
    """A stop of verifiers, asked before each call: its clients repeat one that failed, and each is a step of the
    episode. A trace that was stopped is scored, by what there is."""
    return bool(trace.calls) and trace.calls[-1].error is not None


class Tasksets:
    """Those that were asked for, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[Any, list[Any]]] = {}

    def _load(self, name: str, arguments: dict[str, Any]) -> tuple[Any, list[Any]]:
        key = json.dumps([name, arguments])
        if key not in self._loaded:
            given: dict[str, Any] = {"agent": {"runtime": {"type": "subprocess"}}}
            if vf.default_harness_id(name) == "bash":  # no harness of its own; bash would let a model use this machine
                given["agent"]["harness"] = {"id": "null"}
            if {"id", "taskset.id", "env.taskset.id"} & {*arguments}:
                raise ValueError(f"verifiers:{name} is the taskset's id; leave it out of the arguments")
            stop = {"taskset.task.stops.member_failed": {"fn": f"{__file__}:member_failed"}}
            for path, value in {**arguments, "taskset.id": name, **stop}.items():
                *outer, last = path.removeprefix("env.").split(".") if "." in path else ("taskset", path)
                inner = given
                for step in outer:
                    inner = inner.setdefault(step, {})
                inner[last] = value
            if not issubclass(vf.env_config_type(name, given.get("id", "")), vf.SingleAgentEnvConfig):
                raise ValueError(f"{name} has several agents; here one plays, and each of its calls is a step")
            config = vf.resolve_env_config(given)
            taskset = vf.load_environment(config).taskset
            if not taskset.bounded:
                raise ValueError(f"{name} makes tasks for ever; give it an argument that bounds them")
            self._loaded[key] = config, list(taskset)
        return self._loaded[key]

    async def tasks(self, name: str, arguments: dict[str, Any]) -> dict[str, list[str]]:
        return {PART: [name] * len(self._load(name, arguments)[1])}

    async def play(self, name: str, arguments: dict[str, Any], split: str, row: int, base_url: str) -> float:
        config, tasks = self._load(name, arguments)
        asked = vf.ModelContext(
            model="router", client=vf.EvalClientConfig(base_url=base_url, api_key_var="SRPO_NO_KEY")
        )
        environment = vf.load_environment(config)  # one for each episode: its servers keep a client for each address
        async with environment.serving():
            played = await environment.run_episode(tasks[row], asked)
        errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
        if not played.ok and not (errors and errors[-1].type == "ProviderError"):  # a member's failure is no fault
            said = f"{errors[-1].type}: {errors[-1].message}" if errors else "without an error"
            raise RuntimeError(f"the rollout failed: {said}")
        return float(sum(trace.reward for trace in played.traces))
