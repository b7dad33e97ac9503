"""A server on loopback that speaks OpenAI's chat completions, with faults on demand and a usage log of its own.

In a test: `with OpenAIServer() as server:` runs it on a thread. As a process of its own (for benchmarks):
`python tests/support/openai_server.py --latency 0.1` prints its address. Token counts are words, so that tests can
count them.
"""

import argparse
import asyncio
import email.utils
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens to one request; the default is nothing."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    """Sent instead of the reply."""
    usage: bool = True
    """Whether the reply, or the error, reports usage. An error reports usage only where `billed`."""
    billed: bool = False
    hang: bool = False
    reset: bool = False
    raw: bytes | None = None
    """Sent as the body, as it is: packed, cut, or no text."""
    slow: float = 0.0
    """Seconds between single bytes of the body."""

    @staticmethod
    def retry_after_seconds(seconds: float) -> "Fault":
        return Fault(status=429, headers=(("Retry-After", f"{seconds:g}"),))

    @staticmethod
    def retry_after_date(seconds: float) -> "Fault":
        return Fault(
            status=429, headers=(("Retry-After", email.utils.formatdate(time.time() + seconds, usegmt=True)),)
        )


class OpenAIServer:
    """`faults` is a list that requests take from the front; `always` is the fault of every other request.

    `answer` makes the reply from a request's body; without it `reply` is given, with {query} for the last message.
    """

    def __init__(
        self,
        latency: float = 0.0,
        reply: str = "a plain reply",
        answer: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        self.latency = latency
        self.reply = reply
        self.answer = answer
        self.faults: list[Fault] = []
        self.always = Fault()
        self.requests: list[dict[str, Any]] = []
        """Bodies as they came, with the Authorization header under "authorization" and the path under "path"."""
        self.headers: list[dict[str, str]] = []
        """Of every request, by their names in lower case."""
        self.arrivals: list[float] = []
        self.usage: list[tuple[int, int]] = []
        """(prompt, completion) tokens of every reply or error that reported or was billed for usage."""
        self.connections = 0
        """How many were ever opened."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()

    def hang_up(self) -> None:
        """Close every connection, as a server does that waited long enough for the next request."""
        assert self._loop is not None
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.close)

    def __enter__(self) -> "OpenAIServer":
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def serve(self, announce: bool = False) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            self.connections += 1
            self._writers.add(writer)
            try:
                await self._connection(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                connections.discard(task)
                self._writers.discard(writer)
                writer.transport.abort()

        server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        if announce:
            print(self.url, flush=True)
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split(" ", 2)[1]
            headers = {
                k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head.split("\r\n"))
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                if not await self._answer(path, headers, body, reader, writer):
                    return
            finally:
                self.in_flight -= 1

    async def _answer(
        self,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Whether the connection goes on."""
        self.arrivals.append(time.monotonic())
        request = json.loads(body)
        self.requests.append({**request, "authorization": headers.get("authorization"), "path": path})
        self.headers.append(headers)
        fault = self.faults.pop(0) if self.faults else self.always
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault.hang:
            await reader.read(1)  # until the client goes away
            return False
        if fault.reset:
            return False
        plain = self.reply.replace("{query}", request["messages"][-1]["content"])
        reply = plain if self.answer is None else self.answer(request)
        tokens = (sum(len(m["content"].split()) for m in request["messages"]), len(reply.split()))
        counted = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        document: dict[str, Any]
        if fault.status == 200:
            message = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            document = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": request["model"]}
            document |= {"choices": [message]}
            if fault.usage:
                document["usage"] = counted
        else:
            document = {"error": {"message": f"you asked for {fault.status}", "type": "test"}}
            if fault.billed:
                document["usage"] = counted
        if fault.body is not None and fault.billed:
            document = {**json.loads(fault.body), "usage": counted}
        data = fault.body.encode() if fault.body is not None and not fault.billed else json.dumps(document).encode()
        data = fault.raw if fault.raw is not None else data
        if "usage" in document and (fault.body is None or fault.billed) and fault.raw is None:
            self.usage.append(tokens)
        lines = [f"HTTP/1.1 {fault.status} OK", f"Content-Length: {len(data)}"]
        if "content-type" not in {name.lower() for name, _ in fault.headers}:
            lines.append("Content-Type: application/json")
        head = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in fault.headers), "", ""]).encode()
        if not fault.slow:
            writer.write(head + data)
            return True
        writer.write(head)
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await asyncio.sleep(fault.slow)
        return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0, help="Seconds that every reply takes.")
    asyncio.run(OpenAIServer(parser.parse_args().latency).serve(announce=True))
