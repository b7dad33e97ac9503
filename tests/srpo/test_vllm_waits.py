"""A vLLM server that does not come up, or does not answer, is named in time; real sockets."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from srpo.rollout.vllm_waits import SilentServer, bound_answers, wait_for_server


@contextmanager
def server(answer: Any) -> Iterator[tuple[str, list[str]]]:
    """Address, and what was asked; `answer(handler, n)` is called for the n-th request."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            answer(self, len(asked))

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", asked
    finally:
        made.shutdown()


def says(code: int) -> Any:
    def answer(handler: Any, n: int) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"{}")

    return answer


def silent(handler: Any, n: int) -> None:
    time.sleep(60)


def test_a_start_is_waited_for_and_has_an_end() -> None:
    with server(lambda handler, n: says(200 if n > 1 else 503)(handler, n)) as (url, asked):
        wait_for_server(url, 60.0)
        assert asked == ["/health", "/health"]
    with pytest.raises(SilentServer, match=r"is not up after 0.5 s \(vllm_server_timeout\): it cannot be reach"):
        wait_for_server(url, 0.5)
    with server(says(503)) as (url, _), pytest.raises(SilentServer, match="it answers /health with 503"):
        wait_for_server(url, 0.5)
    with server(silent) as (url, _), pytest.raises(SilentServer, match="takes connections and does not answer"):
        wait_for_server(url, 0.5)


def as_trl_makes_it() -> requests.Session:
    session = requests.Session()
    how = {"status_forcelist": [500, 502, 503], "backoff_factor": 0.01, "allowed_methods": ["POST", "GET"]}
    adapter = HTTPAdapter(max_retries=Retry(total=5, connect=5, read=5, status=3, **how), pool_maxsize=64)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def test_an_answer_that_is_too_late_is_named_and_not_asked_for_again() -> None:
    session = as_trl_makes_it()
    bound_answers(session, 1.0)
    with server(silent) as (url, asked):
        with pytest.raises(SilentServer, match=r"to POST http.*/v1/completions within 0.9 s, 90% of hang_dead"):
            session.post(f"{url}/v1/completions", json={})
        assert asked == ["/v1/completions"]


def test_what_broke_is_still_tried_again() -> None:
    session = as_trl_makes_it()
    bound_answers(session, 60.0)

    def answer(handler: Any, n: int) -> None:
        if n == 1:
            handler.connection.close()  # before a word
        elif n == 2:
            says(503)(handler, n)
        else:
            says(200)(handler, n)

    with server(answer) as (url, asked):
        assert session.post(f"{url}/v1/completions", json={}).json() == {} and len(asked) == 3


def test_trl_s_client_still_has_the_session_and_waits_as_before() -> None:
    from trl.generation import vllm_client, vllm_generation

    text = Path(vllm_client.__file__).read_text()
    assert "self.session = requests.Session()" in text and 'self.session.mount("http://", adapter)' in text
    assert "response = requests.get(url)" in text, "TRL gives its own look at the server a time limit now"
    assert "self.vllm_client = VLLMClient(" in Path(vllm_generation.__file__).read_text()
