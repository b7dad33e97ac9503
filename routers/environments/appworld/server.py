"""Processes that hold AppWorld's worlds, each with one connection to it. See `appworld_worker` for the other side."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from routers.environments.appworld import worker as appworld_worker

START_SECONDS = 300.0
"""For the first answer: the server may still be importing AppWorld, which takes 15 s of a core."""
ANSWER_SECONDS = appworld_worker.CODE_SECONDS + 15.0
"""For any other: AppWorld stops the code itself, unless the code keeps it from doing so."""


class Server:
    """Starts at once and imports AppWorld meanwhile; started again if it has ended when a world is asked for.

    Args:
        python: the interpreter that AppWorld is installed in.
        root: AppWorld's root, which holds `data`.
    """

    def __init__(self, python: str, root: Path) -> None:
        self._python, self._root = python, root
        self._lock = threading.Lock()
        self._folder = tempfile.mkdtemp(prefix="appworld-")
        self._start()

    def _start(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  what the processes say when they break
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [self._python, "-I", appworld_worker.__file__, str(theirs.fileno()), self._folder],
                pass_fds=[theirs.fileno()],
                # Nothing of ours: a model's code may read the environment, and print it into a prompt.
                env={"APPWORLD_ROOT": str(self._root), "PATH": os.defpath, "LANG": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                start_new_session=True,
            )

    def open(self) -> "Connection":
        """A connection to a new process; returns before it is there."""
        with self._lock:
            if self._process.poll() is not None:
                self._start()
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(BrokenPipeError):  # it has just ended: the connection will say so
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        return Connection(ours, self._last_words)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # if it is the server that ends, it may still be speaking
            self._process.wait(1.0)
        size = os.fstat(self._words.fileno()).st_size
        return os.pread(self._words.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()

    def close(self) -> None:
        """End the server and all its worlds."""
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)  # its own work, unless it was killed


class Connection:
    """Requests to one process, answered in order. What fails once has ended, and its process with it."""

    def __init__(self, connection: socket.socket, last_words: Any) -> None:
        self._socket, self._last_words = connection, last_words
        self._unread = b""
        self._pid: int | None = None
        """Set while the process may run a model's code, which may not end by itself."""

    def ask(self, *request: Any, seconds: float, pid: int | None = None) -> Any:
        """`send` and `receive`; `pid` is killed if there is no answer."""
        self._pid = pid
        self.send(*request)
        answer = self.receive(seconds)
        self._pid = None
        return answer

    def send(self, *request: Any) -> None:
        self._socket.settimeout(ANSWER_SECONDS)
        with self._or_end():
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process has ended, or answered with an error.
            TimeoutError: no answer within so many seconds.
        """
        end = time.monotonic() + seconds
        self._socket.settimeout(0.5)  # short waits: an exception that is sent to this thread arrives between them
        with self._or_end():
            while b"\n" not in self._unread:
                if time.monotonic() > end:
                    raise TimeoutError(f"AppWorld's process gave no answer within {seconds:g} s")
                with contextlib.suppress(TimeoutError):
                    data = self._socket.recv(1 << 16)
                    if not data:
                        raise ConnectionResetError
                    self._unread += data
            line, _, self._unread = self._unread.partition(b"\n")
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"AppWorld: {answer['error']}")
            return answer["result"]

    @contextlib.contextmanager
    def _or_end(self) -> Any:
        try:
            yield
        except ConnectionError as error:
            self.close()
            raise RuntimeError(f"AppWorld's process has ended; its last words: {self._last_words()}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The process ends: by itself, or killed where it is busy."""
        self._socket.close()
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._pid = None
