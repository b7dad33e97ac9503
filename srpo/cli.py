"""How a script ends: a user's mistake with one line and exit code 2, a fault of the program with its traceback.

What our code raises on purpose (`raise ValueError(...)` in srpo, routers, rewards or a script) is worded for the user,
and so is what the system says of a file. Anything else is a fault, and its traceback is what a report of it needs.
`python -X dev` shows the traceback of mistakes too.
"""

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from srpo.types import Stopped

_OURS = ("srpo", "routers", "rewards")
_EXTRAS = {"fastapi": "serve", "openai": "serve", "starlette": "serve", "uvicorn": "serve"}


def run(main: Callable[[], Any], *stops: type[BaseException]) -> NoReturn:
    """Call a script's `main` and end the process: its integer, 0 for anything else, 2 after a user's mistake.

    Args:
        stops: exceptions that end a run as it was asked to end, with code 1.
    """
    try:
        code = main()
    except (Stopped, *stops) as stopped:
        sys.exit(f"STOPPED: {_one_line(stopped)}")
    except Exception as error:
        if sys.flags.dev_mode or not is_mistake(error):
            raise
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"process {rank}: "
        if not getattr(error, "said", False):  # by the process that found it, to all of the run
            print(f"{who}error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def is_mistake(error: BaseException) -> bool:
    """Whether an exception is worded for the user."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] not in _OURS
    return isinstance(error, (ValueError, TypeError, ImportError)) and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module, file = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_frame.f_code.co_filename
    ours = module.split(".")[0] in _OURS or Path(file).parent == Path(sys.argv[0]).resolve().parent
    return ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise")


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = _EXTRAS.get(error.name.split(".")[0])
        text += f": pip install {f'{chr(39)}srpo[{extra}]{chr(39)}' if extra else error.name.split('.')[0]}"
    return " ".join(text.split()) or type(error).__name__
