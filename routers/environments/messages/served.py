"""Agents of others as they are: they call a server on this machine, and each call is one decision of the policy.

    def run(base_url, task):                     # your agent: any client of OpenAI's API, in any framework
        client = OpenAI(base_url=base_url, api_key="none")
        return 1.0 if solve(client, task) else 0.0

    AGENTS["mine"] = ServedAgent(run, {"train": {...id: type...}, "test": {...}})
    srpo.train.main(["recipe.yaml"])             # environment: messages, train_tasks: mine/train

`run` works in a thread of its own; its calls block until the policy has decided and the member has answered. A script
that owns its process takes episodes from the outside instead (`Visitors`):

    with episode("http://127.0.0.1:8700") as played:         # waits until the training has one
        played.score = solve(OpenAI(base_url=played.base_url, api_key="none"), played.task)

The address holds a token of the episode, so that episodes at the same time never mix. Whole replies and streams are
served; an agent may call again while a call is open, and is then answered in order. A member that failed is a 502, an
episode that is over a 503: who then ends with a score is scored. An exception of `run` loses the episode.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from routers.data.prompt_cache import estimated_messages, tokens_of
from routers.environments.messages.agent import CutOff, MemberFailed, Talk
from routers.environments.protocol import GameError
from routers.pool.events import chunks_of

LONGEST_BODY = 32 * 2**20
QUIET_SECONDS = 600.0
"""An agent that neither calls nor ends for so long is lost."""
GRACE_SECONDS = 10.0
"""For an agent that was cut off, to end with a score."""

Run = Callable[[str, str], float]
"""(base URL, task) -> the score in [0, 1]."""


class AgentFailed(RuntimeError):
    """The agent raised, or fell silent; the text says which."""


@dataclass
class _Call:
    body: Mapping[str, Any]
    answered: Future[Mapping[str, Any]]


class _Episode:
    """One episode between an agent and whoever decides."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.events: queue.Queue[_Call | float | BaseException] = queue.Queue()
        self.over = False

    def call(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The reply to a request of the agent's; called in the thread of its connection.

        Raises:
            MemberFailed, CutOff: there is none.
        """
        call = _Call(body, Future())
        if self.over:
            raise CutOff("the episode is over")
        self.events.put(call)
        while True:
            with suppress(TimeoutError):
                return call.answered.result(1.0)
            if self.over and not call.answered.done():
                raise CutOff("the episode is over")


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # five, as it is else, are refused by a reset where many agents call at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # an agent that leaves is no error
            super().handle_error(request, client_address)


class _Server:
    """The one of a process: chat completions of all its episodes, and episodes for visitors."""

    def __init__(self, port: int = 0) -> None:
        self.episodes: dict[str, _Episode] = {}
        self.waiting: queue.Queue[str] = queue.Queue()
        outer = self

        class Handler(_Handler):
            server_of = outer

        self._http = _Http(("127.0.0.1", port), Handler)
        threading.Thread(target=self._http.serve_forever, name="srpo-agents", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def base_url(self, token: str) -> str:
        return f"{self.url}/{token}/v1"

    def open(self, task: str) -> tuple[str, _Episode]:
        token, episode = secrets.token_hex(12), _Episode(task)
        self.episodes[token] = episode
        return token, episode

    def close(self, token: str) -> None:
        self.episodes.pop(token).over = True


_lock = threading.Lock()
_servers: dict[int, _Server] = {}


def _server(port: int = 0) -> _Server:
    """The server of this process at a port; 0: any.

    Raises:
        GameError: the port is taken.
    """
    with _lock:
        if port not in _servers:
            try:
                _servers[port] = _Server(port)
            except OSError as error:
                raise GameError(f"no server for agents at port {port}: {error}") from None
        return _servers[port]


class ServedAgent:
    """An `Agent` that calls a server.

    Args:
        run: the agent; called in a thread of its own, for many episodes at once.
        splits: split -> task id -> type.
    """

    waits = True

    def __init__(self, run: Run, splits: Mapping[str, Mapping[str, str]]) -> None:
        self._run, self._splits = run, splits

    def tasks(self, split: str, count: int = 0) -> Mapping[str, str]:
        if split not in self._splits:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(self._splits)}")
        return self._splits[split]

    def _server(self) -> _Server:
        return _server()

    def _begin(self, server: _Server, token: str, episode: _Episode) -> None:
        def work() -> None:
            try:
                episode.events.put(self._run(server.base_url(token), episode.task))
            except BaseException as error:
                episode.events.put(error)

        threading.Thread(target=work, name="srpo-agent", daemon=True).start()

    def talk(self, task: str) -> Talk:
        server = self._server()
        token, episode = server.open(task)
        self._begin(server, token, episode)
        try:
            seconds = QUIET_SECONDS
            while True:
                try:
                    event = episode.events.get(timeout=seconds)
                except queue.Empty:
                    if episode.over:
                        raise CutOff("the agent did not end") from None
                    raise AgentFailed(f"the agent neither called nor ended for {seconds:g} s") from None
                if isinstance(event, BaseException):
                    raise AgentFailed(f"the agent raised {type(event).__name__}: {event}") from event
                if not isinstance(event, _Call):
                    return event
                if episode.over:
                    _settle(event, CutOff("the episode is over"))
                    continue
                try:
                    _settle(event, (yield event.body))
                except MemberFailed as error:
                    _settle(event, error)
                except CutOff as error:
                    episode.over, seconds = True, GRACE_SECONDS
                    _settle(event, error)
        finally:
            server.close(token)


class Visitors(ServedAgent):
    """An `Agent` whose episodes are played by scripts from the outside, through `episode`.

    Args:
        splits: as in `ServedAgent`.
        port: where they find the training.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, str]], port: int) -> None:
        super().__init__(lambda base_url, task: 0.0, splits)
        self._port = port

    def _server(self) -> _Server:
        return _server(self._port)

    def _begin(self, server: _Server, token: str, episode: _Episode) -> None:
        server.waiting.put(token)


@dataclass
class Played:
    """An episode that a visitor plays."""

    base_url: str
    task: str
    score: float = 0.0
    """To be set before the block ends."""


@contextmanager
def episode(url: str, seconds: float = QUIET_SECONDS) -> Iterator[Played]:
    """Take the next episode of a training with `Visitors`. An exception in the block loses the episode.

    Args:
        url: of the training, http://127.0.0.1:PORT.
        seconds: to wait for an episode.

    Raises:
        TimeoutError: there is none.
        OSError: there is no training at the address.
    """
    end = time.monotonic() + seconds
    while not (claimed := _post(f"{url}/claim", {})):
        if time.monotonic() > end:
            raise TimeoutError(f"{url} had no episode for {seconds:g} s")
    played = Played(claimed["base_url"], claimed["task"])
    try:
        yield played
    except BaseException as error:
        _post(f"{played.base_url}/end", {"error": f"{type(error).__name__}: {error}"})
        raise
    _post(f"{played.base_url}/end", {"score": played.score})


def _post(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def _settle(call: _Call, result: Mapping[str, Any] | BaseException) -> None:
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            call.answered.set_exception(result)
        else:
            call.answered.set_result(result)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: _Server

    def do_GET(self) -> None:
        if self.path.endswith("/v1/models"):
            return self._send(200, {"object": "list", "data": [{"id": "router", "object": "model", "created": 0}]})
        self._error(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > LONGEST_BODY:
            self.close_connection = True
            return self._error(413, f"the body is larger than {LONGEST_BODY:,} bytes")
        try:
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            return self._error(400, "the body is not JSON")
        if self.path == "/claim":
            return self._claim()
        token, _, what = self.path.strip("/").partition("/v1/")
        episode = self.server_of.episodes.get(token)
        if episode is None:
            return self._error(404, "there is no such episode, or it is over")
        if what == "end":
            return self._end(episode, body)
        if what != "chat/completions":
            return self._error(404, f"there is no /v1/{what}; use /v1/chat/completions")
        messages = body.get("messages") if isinstance(body, dict) else None
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return self._error(400, "'messages' must be a list of objects, and not empty")
        try:
            message = episode.call(body)
        except MemberFailed as error:
            return self._error(502, f"the member failed: {error}")
        except CutOff as error:
            return self._error(503, str(error))
        self._reply(body, message)

    def _claim(self) -> None:
        try:
            token = self.server_of.waiting.get(timeout=20.0)
        except queue.Empty:
            return self._send(200, None)
        episode = self.server_of.episodes.get(token)
        if episode is None:  # given up meanwhile
            return self._send(200, None)
        self._send(200, {"base_url": self.server_of.base_url(token), "task": episode.task})

    def _end(self, episode: _Episode, body: Any) -> None:
        error = body.get("error")
        episode.events.put(body.get("score", 0.0) if error is None else RuntimeError(str(error)))
        self._send(200, {})

    def _reply(self, body: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        prompt = sum(map(tokens_of, estimated_messages(body["messages"])))
        written = sum(map(tokens_of, estimated_messages([message])))
        usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.get("model", "router"),
        }
        choice = {"index": 0, "message": message, "finish_reason": reason}
        document = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        if not body.get("stream"):
            return self._send(200, document)
        if not (body.get("stream_options") or {}).get("include_usage"):
            del document["usage"]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks_of(document)) + "data: [DONE]\n\n"
        self._send(200, text.encode(), "text/event-stream")

    def _error(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})

    def _send(self, status: int, document: Any, kind: str = "application/json") -> None:
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        with suppress(ConnectionError):  # the agent has gone
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None: ...
