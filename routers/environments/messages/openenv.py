"""Environments behind OpenEnv's server (Meta, BSD-3), as agents that speak messages.

    train_tasks: openenv:127.0.0.1:8000/train      a session of the server per episode, reset with the task as seed
    train_tasks: "openenv:my-space.hf.space?tls=true&level=2/train"      over TLS; level=2 goes to every reset

The package `openenv` is needed by the server only, and cannot be installed beside this library (its fastmcp wants an
mcp that vLLM does not): its protocol, JSON over one WebSocket, is spoken here. Where an action is the call of a tool
(the package's MCPEnvironment), tools are `tools` and an answer without a call ends the episode; where it has one field
of text, what the assistant says is that field; else it is the JSON of the action. The server says how many sessions it
takes (one, unless it is told): as many as there are episodes at once are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import aiohttp

from routers.environments.messages.agent import Agent, Talk
from routers.environments.messages.games import GymAgent
from routers.environments.messages.named import Scale, seeds
from routers.environments.protocol import GameError
from routers.environments.react import FREE_INSTRUCTION, read_free_action
from srpo.rollout.worker_loop import EpisodeLoop, Failure

ANSWER_SECONDS = 120.0
"""For one answer of the server's."""
LARGEST = 32 * 2**20
_LOOP = EpisodeLoop()
"""Where the connections of all episodes live."""
_OURS = ("done", "reward", "metadata")


class OpenEnvError(RuntimeError):
    """The server could not be reached, or answered with an error."""


def openenv_agent(place: str, reset: Mapping[str, Any], scale: Scale) -> Agent:
    """The environment that a server at HOST:PORT has.

    Args:
        place: of the server, without http://.
        reset: what every reset is given beside the seed; `tls` is ours.
        scale: what its rewards are worth.

    Raises:
        GameError: there is no such server.
    """
    given = dict(reset)
    url = f"http{'s' if given.pop('tls', False) else ''}://{place}"
    try:
        about, action = _now(lambda: _get(f"{url}/metadata")), _now(lambda: _get(f"{url}/schema"))["action"]
    except (OpenEnvError, LookupError, TypeError) as error:
        raise GameError(f"openenv:{place}: no OpenEnv server answers at {url} ({error})") from None
    kind, about = str(about.get("name", place)), str(about.get("description", ""))
    if action.get("properties", {}).get("type", {}).get("const") == "call_tool":
        return ToolAgent(lambda: _World(url, given), kind, about, scale)
    fields = {name: told for name, told in action.get("properties", {}).items() if name not in _OURS}
    [only, *others] = fields or {"": {}}
    if not others and fields.get(only, {}).get("type") == "string":
        how, read = f"An action is a text: {fields[only].get('description', only)}", _text(only)
    else:
        how, read = f"An action is a JSON object by this schema: {json.dumps(action)}", _object
    return GymAgent(
        lambda task: _World(url, given),
        lambda split, count: seeds(split, kind, count),
        f"{about}\n\n{FREE_INSTRUCTION}\n\n{how}".strip(),
        read,
        score=lambda total, info: scale.score(total),
        waits=True,
    )


def _text(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda said: {field: read_free_action(said)}


def _object(said: str) -> dict[str, Any]:
    try:
        action = json.loads(read_free_action(said))
    except (ValueError, RecursionError):
        action = None
    if not isinstance(action, dict):
        raise ValueError("the action is not a JSON object")
    return action


class ToolAgent:
    """Sessions whose actions are calls of tools.

    Args:
        make: a fresh session.
        kind: type of all tasks.
        told: the system's message.
        scale: what rewards are worth.
    """

    waits = True

    def __init__(self, make: Callable[[], _World], kind: str, told: str, scale: Scale) -> None:
        self._make, self._kind, self._told, self._scale = make, kind, told, scale

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        return seeds(split, self._kind, count)

    def talk(self, task: str) -> Talk:
        world, total, done = self._make(), 0.0, False
        try:
            first, _ = world.reset(int(task))
            tools = [_tool(tool) for tool in world.act({"type": "list_tools"})["observation"]["tools"]]
            messages: list[Any] = [{"role": "system", "content": self._told}, {"role": "user", "content": first}]
            while not done:
                reply = yield {"messages": list(messages), "tools": tools}
                messages.append(reply)
                done = not reply.get("tool_calls")
                for call in reply.get("tool_calls") or ():
                    text, reward, ended = _called(world, call["function"])
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
                    total, done = total + reward, done or ended
            return self._scale.score(total)
        finally:
            world.close()


def _tool(told: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": told["name"], "description": told["description"], "parameters": told["input_schema"]}
    return {"type": "function", "function": function}


def _called(world: _World, function: Mapping[str, Any]) -> tuple[str, float, bool]:
    """(result, reward, whether the session is over) of one call."""
    try:
        given = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return "Error: the arguments are not JSON", 0.0, False
    found = world.act({"type": "call_tool", "tool_name": function["name"], "arguments": given})
    if "error" in found:
        return f"Error: {found['error']}", 0.0, False
    told, ended = found["observation"], bool(found.get("done"))
    if told.get("error"):
        return f"Error: {told['error']['message']}", float(found.get("reward") or 0.0), ended
    result = told.get("result")
    if isinstance(result, Mapping) and "content" in result:  # as MCP has it: the value, or texts
        texts = [part["text"] for part in result["content"] or () if part.get("type") == "text"]
        result = "\n".join(texts) if result.get("data") is None else result["data"]
    return result if isinstance(result, str) else json.dumps(result), float(found.get("reward") or 0.0), ended


class _World:
    """A session of the server's, in gymnasium's manner. An action that it does not take is told; nothing changes."""

    def __init__(self, url: str, given: Mapping[str, Any]) -> None:
        self._url, self._given = url, given
        self._session: aiohttp.ClientSession | None = None
        self._socket: Any = None

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        found = self._ask({"type": "reset", "data": {**self._given, "seed": seed}})
        return _shown(found), {}

    def step(self, action: Mapping[str, Any]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        found = self.act(action)
        if "error" in found:
            return f"Error: {found['error']}", 0.0, False, False, {}
        return _shown(found), float(found.get("reward") or 0.0), bool(found.get("done")), False, {}

    def act(self, action: Mapping[str, Any]) -> dict[str, Any]:
        """What the server says to an action; `error`: why it is none."""
        return self._ask({"type": "step", "data": action})

    def close(self) -> None:
        if (session := self._session) is not None:
            self._session = None
            _now(session.close)

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return _now(lambda: self._exchange(message))

    async def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            self._session = aiohttp.ClientSession()
            self._socket = await self._session.ws_connect(f"{self._url}/ws", max_msg_size=LARGEST)
        await self._socket.send_str(json.dumps(message))
        answer = json.loads(await self._socket.receive_str())
        data: dict[str, Any] = answer["data"]
        if answer["type"] != "error":
            return data
        if data.get("code") == "VALIDATION_ERROR" and message["type"] == "step":
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in data.get("errors") or ()]
            return {"error": "; ".join(wrong) or data.get("message")}
        raise OpenEnvError(f"the server answered {data.get('code')}: {data.get('message')}")


def _shown(found: Mapping[str, Any]) -> str:
    """An observation: its one text, or its JSON; of one that has no fields of its own, what it says in metadata."""
    seen: Mapping[str, Any] = found["observation"]
    told = {name: value for name, value in seen.items() if name not in _OURS} or dict(seen.get("metadata") or {})
    values = list(told.values())
    return values[0] if len(values) == 1 and isinstance(values[0], str) else json.dumps(told)


async def _get(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        reply.raise_for_status()
        return await reply.json()


def _now(job: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What `job` returns, on the loop of the connections.

    Raises:
        OpenEnvError: it raised, or took longer than `ANSWER_SECONDS`.
    """
    [found] = _LOOP.run([job], ANSWER_SECONDS)
    if isinstance(found, Failure):
        raise OpenEnvError(found.cause)
    return found
