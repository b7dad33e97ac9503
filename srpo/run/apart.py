"""A user's function in a process of its own, asked for one completion at a time: one that takes too long is killed.

Neither `await` nor a thread ends a function that computes for ever, sleeps, or is stuck in C. Killing its process
does, with everything that it has started there; the next completion gets a new one. A function that can be imported
goes there by its name; a closure, a lambda or one of the script that was started goes by its code, with what it has
captured (cloudpickle): a fork would take along locks that threads of this process hold, and on a GPU a context that no
child can use. What it prints appears as usual; what it logs (`log_extra`, `log_metric`) comes back with its value.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from srpo.run.signals import turn_deaf

_START = 300.0
"""Seconds for importing the module of a function."""
LOGS = ("log_extra", "log_metric")
"""Arguments of a reward function that stay here."""

Logged = list[tuple[str, Any, Any]]
"""(which of the two, name, value)."""


@dataclass(frozen=True)
class Lost:
    """In place of a value: why there is none."""

    cause: str


class Apart:
    """A function, apart.

    Args:
        name: for messages: "reward function 'judge'".
        key: the setting that asks for this.
        seconds: of one call.

    Raises:
        ValueError: the function cannot be sent to another process, or not be loaded there.
    """

    def __init__(self, func: Callable[..., Any], name: str, key: str, seconds: float) -> None:
        self.func, self.name, self.key, self.seconds = func, name, key, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._shared: dict[str, Any] = {}
        self._start()

    def _cannot(self, why: str) -> str:
        return (
            f"{self.key}: {self.name} cannot run in a process of its own: {why}. Let it hold nothing but plain values "
            f"and functions, or leave {self.key} out"
        )

    def share(self, values: Mapping[str, Any]) -> None:
        """Arguments of all calls until this is called again."""
        self._shared = dict(values)
        if self._process is not None:
            self._give()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Logged]:
        """What the function returns, or `Lost`; and what it has logged.

        Raises:
            RuntimeError: the function has raised; with its traceback.
            ValueError: the arguments cannot be sent to another process.
        """
        if self._process is None:
            self._start()
        self._send((None, args, kwargs))
        answer = self._answer(self.seconds)
        if isinstance(answer, Lost):
            return answer, []
        value, raised, logged = answer
        if raised is not None:
            error = RuntimeError(f"{self.name} raised {raised[0]}")
            error.add_note(f"There:\n{raised[1]}")
            raise error
        return value, logged

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        serve = f"from srpo.run.apart import serve; serve({theirs.fileno()})"
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", serve],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the run's; and all that it starts can be killed together
        )
        theirs.close()
        self._link = Connection(ours.detach())
        self._send(self.func)
        found = self._answer(_START)
        if found is not None:
            self.close()
            raise ValueError(self._cannot(found.cause if isinstance(found, Lost) else found))
        if self._shared:
            self._give()

    def _give(self) -> None:
        """The arguments of all calls. Reading them may import much there (a trainer's state: transformers), which is
        no time of the function's."""
        self._send((self._shared, None, None))
        found = self._answer(_START)
        if found is not None:
            self.close()
            raise ValueError(self._cannot(found.cause))

    def _send(self, what: Any) -> None:
        assert self._link is not None
        try:
            self._link.send_bytes(cloudpickle.dumps(what))
        except OSError:  # it has ended: that is the answer
            pass
        except Exception as error:  # whatever the parts of an object raise when they are pickled
            self.close()
            raise ValueError(self._cannot(str(error))) from error

    def _answer(self, seconds: float) -> Any:
        """What the process says; else it is killed."""
        assert self._link is not None and self._process is not None
        with suppress(OSError, EOFError):
            if self._link.poll(seconds):
                return self._link.recv()
            self.close()
            return Lost(f"{self.name} gave no answer within {seconds:g} s ({self.key})")
        with suppress(subprocess.TimeoutExpired):  # the link closes before the process has ended
            self._process.wait(5.0)
        code = self._process.poll()
        self.close()
        how = "was ended" if code is None else f"ended with code {code}"
        with suppress(ValueError):
            how = f"was ended by {signal.Signals(-(code or 0)).name}"
        return Lost(f"the process of {self.name} {how}")

    def close(self) -> None:
        """Kill the process, and all that it has started; another call starts one again."""
        if self._process is None or self._link is None:
            return
        self._link.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = self._link = None


def serve(descriptor: int) -> None:
    """The other side, in its own process."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan is left where the run is killed
    turn_deaf()
    link = Connection(descriptor)
    try:
        func = link.recv()
    except BaseException as error:
        link.send(f"{type(error).__name__}: {error}")
        return
    link.send(None)
    shared: dict[str, Any] = {}
    with suppress(EOFError, OSError):
        while True:
            new, args, kwargs = link.recv()
            if new is not None:
                shared = new
                link.send(None)
                continue
            link.send(_asked(func, args, {**shared, **kwargs}))


def _asked(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Logged]:
    logged: Logged = []
    for log in LOGS:
        if log in kwargs:
            kwargs[log] = lambda name, value, log=log: logged.append((log, name, value))
    try:
        return func(*args, **kwargs), None, logged
    except Exception as error:
        return None, (f"{type(error).__name__}: {error}", traceback.format_exc()), logged
