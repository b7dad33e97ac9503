"""A server of OpenEnv's on loopback, made by the package's own base classes; without it, by aiohttp in its place.

python openenv_server.py PORT_FILE          OPENENV_PYTHON is a Python that has the package

With "tools" behind it, what is said is said by a tool.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


class Guess:
    """Say the last digit of the seed; three tries."""

    def reset(self, seed: int) -> tuple[str, float, bool]:
        self.goal, self.tries = str(seed % 10), 0
        return f"say {self.goal}", 0.0, False

    def step(self, message: str) -> tuple[str, float, bool]:
        if message == "boom":
            raise RuntimeError("the world broke")
        if message == "hang":
            time.sleep(20)
        self.tries += 1
        return f"you said {message}", float(message == self.goal), message == self.goal or self.tries == 3


def official() -> Any:
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    from pydantic import Field

    class Say(Action):
        message: str = Field(description="what you say", max_length=20)

    class Heard(Observation):
        text: str

    class Server(Environment):  # type: ignore[misc]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int = 0, episode_id: Any = None, **_: Any) -> Heard:
            self.world = Guess()
            text, reward, done = self.world.reset(seed)
            return Heard(text=text, reward=reward, done=done)

        def step(self, action: Say, timeout_s: Any = None, **_: Any) -> Heard:
            text, reward, done = self.world.step(action.message)
            return Heard(text=text, reward=reward, done=done)

        @property
        def state(self) -> State:
            return State()

    return create_fastapi_app(Server, Say, Heard, max_concurrent_envs=16)


def official_tools() -> Any:
    from fastmcp import FastMCP
    from openenv.core.env_server import State, create_fastapi_app
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
    from openenv.core.env_server.types import Observation

    class Server(MCPEnvironment):  # type: ignore[misc]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            self.world, self.last = Guess(), ("", 0.0, False)
            tools = FastMCP("guess")

            @tools.tool
            def say(message: str) -> str:
                """Says it."""
                self.last = self.world.step(message)
                return self.last[0]

            super().__init__(tools)

        def reset(self, seed: int = 0, episode_id: Any = None, **_: Any) -> Any:
            return Observation(metadata={"text": self.world.reset(seed)[0]})

        async def step_async(self, action: Any, timeout_s: Any = None, **_: Any) -> Any:
            self.last = ("", 0.0, False)
            found = await super().step_async(action, timeout_s=timeout_s)
            found.reward, found.done = self.last[1:]
            return found

        def _step_impl(self, action: Any, timeout_s: Any = None, **_: Any) -> Any:
            raise NotImplementedError

        @property
        def state(self) -> State:
            return State()

    return create_fastapi_app(Server, CallToolAction, CallToolObservation, max_concurrent_envs=16)


def stand_in() -> Any:
    from aiohttp import web

    fields: dict[str, Any] = {"message": {"type": "string", "description": "what you say"}}
    if "tools" in sys.argv:
        fields = {"type": {"const": "call_tool"}, "tool_name": {"type": "string"}, "arguments": {"type": "object"}}
    fields["metadata"] = {"type": "object"}
    takes = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    say = {"name": "say", "description": "Says it.", "input_schema": takes}

    async def schema(request: Any) -> Any:
        return web.json_response({"action": {"properties": fields, "required": ["message"], "type": "object"}})

    async def metadata(request: Any) -> Any:
        return web.json_response({"name": "Server", "description": "Server environment"})

    def answer(world: Guess, message: Any) -> tuple[str, Any]:
        if message["type"] == "step" and len(message["data"]["message"]) > 20:
            wrong = {"loc": ["message"], "msg": "String should have at most 20 characters"}
            return "error", {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": [wrong]}
        try:
            text, reward, done = getattr(world, message["type"])(**message["data"])
        except RuntimeError as error:
            return "error", {"message": str(error), "code": "EXECUTION_ERROR"}
        return "observation", {"observation": {"text": text, "metadata": {}}, "reward": reward, "done": done}

    def tool(world: Guess, message: Any) -> tuple[str, Any]:
        asked, seen = message["data"], {"metadata": {}}
        if message["type"] == "reset":
            return "observation", {"observation": {"metadata": {"text": world.reset(**asked)[0]}}, "done": False}
        if asked["type"] == "list_tools":
            return "observation", {"observation": {"tools": [say]}, "done": False}
        try:
            text, reward, done = world.step(**asked["arguments"])
        except Exception as error:
            told = {**seen, "result": None, "error": {"message": f"Error calling tool 'say': {error}"}}
            return "observation", {"observation": told, "reward": 0.0, "done": False}
        result = {"content": [{"type": "text", "text": text}], "data": text}
        return "observation", {"observation": {**seen, "result": result}, "reward": reward, "done": done}

    async def talk(request: Any) -> Any:
        socket, world = web.WebSocketResponse(), Guess()
        await socket.prepare(request)
        async for message in socket:
            kind, data = await asyncio.to_thread(
                tool if "tools" in sys.argv else answer, world, json.loads(message.data)
            )
            await socket.send_str(json.dumps({"type": kind, "data": data}))
        return socket

    app = web.Application()
    app.add_routes([web.get("/schema", schema), web.get("/metadata", metadata), web.get("/ws", talk)])
    return app


async def main() -> None:
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    written = Path(sys.argv[1])
    try:
        app = official_tools() if "tools" in sys.argv else official()
    except ImportError:
        from aiohttp import web

        runner = web.AppRunner(stand_in())
        await runner.setup()
        await web.SockSite(runner, listening).start()
        serving: Any = asyncio.Event().wait()
    else:
        import uvicorn

        serving = uvicorn.Server(uvicorn.Config(app, log_level="warning")).serve(sockets=[listening])
    written.with_suffix(".tmp").write_text(str(listening.getsockname()[1]))
    written.with_suffix(".tmp").rename(written)
    await serving


if __name__ == "__main__":
    asyncio.run(main())
