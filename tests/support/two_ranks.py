"""Two forks of this process as the ranks of a run: how each ends, and all that they said. In `forked`
a rank that ends badly is a failure; here it is what is looked at."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path


def two_ranks(
    folder: Path, work: Callable[[int, int], object], seconds: float, launcher: bool = False
) -> tuple[list[int], float, str]:
    """Exit codes (999: killed after `seconds`), the seconds that both took, and their words.

    Args:
        work: called with (rank, a free port of this machine).
        launcher: asks the other with SIGTERM when one has ended, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, began, forks, codes = folder / "said.txt", time.monotonic(), list[int](), dict[int, int]()
    for rank in (0, 1):
        forks.append(os.fork())
        if forks[-1] == 0:
            code = 0
            try:
                out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
                work(rank, port)
            except SystemExit as asked:
                code = int(asked.code or 0)
            except BaseException:
                code = 1
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
    while len(codes) < 2 and time.monotonic() - began < seconds:
        for rank, fork in enumerate(forks):
            if rank not in codes and (ended := os.waitpid(fork, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                if launcher and len(codes) == 1:
                    os.kill(forks[1 - rank], signal.SIGTERM)
        time.sleep(0.02)
    took = time.monotonic() - began
    for rank in {0, 1} - set(codes):
        os.kill(forks[rank], signal.SIGKILL)
        os.waitpid(forks[rank], 0)
    words = said.read_text(errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    return [codes.get(rank, 999) for rank in (0, 1)], took, re.sub(r"\[rank\d\]: ", "", words)  # torch's own
