"""A server of OpenEnv's on loopback, made by the package's own base classes; without it, by aiohttp in its place.

python openenv_server.py PORT_FILE          OPENENV_PYTHON is a Python that has the package
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


def stand_in() -> Any:
    from aiohttp import web

    fields = {"metadata": {"type": "object"}, "message": {"type": "string", "description": "what you say"}}

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

    async def talk(request: Any) -> Any:
        socket, world = web.WebSocketResponse(), Guess()
        await socket.prepare(request)
        async for message in socket:
            kind, data = await asyncio.to_thread(answer, world, json.loads(message.data))
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
        app = official()
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
