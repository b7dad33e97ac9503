"""Waits for a vLLM server (`vllm_mode: server`) have an end, and say what was waited for.

TRL's client asks without any time limit: a server that has taken a connection and does not answer, or that answers
503 for ever, holds a run where it is. Here the start is waited for `vllm_server_timeout` in all, and each answer for a
part of `hang_deadline`, so that it is named before the run is ended without knowing more. A connection that breaks is
tried again, as TRL's client does; an answer that is too late is not: the server would generate it twice.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry

_SHARE = 0.9
"""Of `hang_deadline`."""
_LOOK, _PAUSE = 10.0, 2.0
"""Seconds that one look at a starting server may take, and between two."""


_RETRIES = ("total", "connect", "read", "status", "status_forcelist", "backoff_factor", "allowed_methods")


class SilentServer(TimeoutError):
    """A vLLM server did not answer in time; names it, what it was asked, and the setting."""


def wait_for_server(url: str, seconds: float) -> None:
    """Return when the server is up.

    Raises:
        SilentServer: it is not, within so many seconds; in the words of the last look at it.
    """
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            code = requests.get(f"{url}/health", timeout=max(min(_LOOK, left), 0.1)).status_code
            if code == 200:
                return
            last = f"it answers /health with {code}"
        except requests.Timeout:
            last = "it takes connections and does not answer /health"
        except requests.RequestException as error:
            last = f"it cannot be reached ({type(error).__name__})"
        if end - time.monotonic() < _PAUSE:
            raise SilentServer(
                f"use_vllm: the vLLM server at {url} is not up after {seconds:g} s (vllm_server_timeout): {last}. "
                "Start it with `vllm serve`, or raise vllm_server_timeout"
            )
        time.sleep(_PAUSE)


def bound_answers(session: requests.Session, hang_deadline: float) -> None:
    """Each answer in this session of TRL's client comes within a part of `hang_deadline`, or is an error."""
    adapters: list[Any] = [*{id(adapter): adapter for adapter in session.adapters.values()}.values()]
    for adapter in adapters:
        theirs, send = adapter.max_retries, adapter.send
        adapter.max_retries = _NotWhenLate(**{name: getattr(theirs, name) for name in _RETRIES})
        adapter.send = partial(_sent, send, _SHARE * hang_deadline)


def _sent(send: Callable[..., Any], seconds: float, request: Any, **how: Any) -> Any:
    try:
        return send(request, **{**how, "timeout": seconds})
    except requests.Timeout as error:
        raise SilentServer(
            f"use_vllm: the vLLM server gave no answer to {request.method} {request.url} within {seconds:g} s, "
            f"{_SHARE:.0%} of hang_deadline"
        ) from error


class _NotWhenLate(Retry):
    def increment(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(error := kwargs.get("error"), ReadTimeoutError):
            raise error
        return super().increment(*args, **kwargs)
