"""vLLM's own OpenAI-compatible server as a process of its own, on the CPU."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 800.0
"""Seconds for a start, which is minutes of nothing but imports where many processes share two cores. A server that
ended is seen at once."""


def healthy(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def vllm_server(weights: Path, log: Path, *more: str) -> Iterator[str]:
    """The address of a server of the model in a folder (SmolLM2 is unpacked there, if nothing is), by the quickstart's
    own command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "routers.quickstart.serve", "vllm", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--weights", str(weights), *more], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not healthy(address):
            state = "ended" if process.poll() is not None else "is not up"
            if state == "ended" or time.monotonic() > until:
                pytest.fail(f"the server {state}; the end of what it said:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):  # its engine is a process of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
