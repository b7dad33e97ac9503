"""`srpo train --processes 8 --accelerate fsdp2`: accelerate's launcher, in this process.

The launcher's own command ends with exit code 1 and, for several processes, with a traceback of its own whatever the
processes said; here its result is theirs: one line and code 2 after a mistake of the user.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from srpo.run.signals import HEARD
from srpo.shipped import RECIPES


def launch_options(words: list[str]) -> tuple[Path | None, int | None]:
    """`--accelerate` (a file, or the name of a shipped one) and `--processes`, taken out of a command line."""
    config, count = _taken("--accelerate", words), _taken("--processes", words)
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"--processes {count}: must be a whole number, at least 1")
    path = None
    if config is not None:
        shipped = RECIPES / "accelerate" / f"{config}.yaml"
        path = shipped if shipped.is_file() else Path(config)
        if not path.is_file():
            known = ", ".join(sorted(one.stem for one in (RECIPES / "accelerate").glob("*.yaml")))
            raise ValueError(f"--accelerate {config}: neither a file nor one of {known}")
    return path, None if count is None else int(count)


def launch(module: str, config: Path | None, count: int | None, words: Sequence[str]) -> int:
    """Run a module in several processes; returns the exit code that it would have had alone."""
    program = ["--module", module, *words]
    if config is None:
        return _ended(*_without_config(count or 1, program))
    from accelerate.commands.launch import launch_command, launch_command_parser

    several = ["--num_processes", str(count)] if count else []
    return _ended(launch_command, launch_command_parser(), ["--config_file", str(config), *several, *program])


def _taken(option: str, words: list[str]) -> str | None:
    for i, word in enumerate(words):
        if word == option or word.startswith(f"{option}="):
            value = word.partition("=")[2] or " ".join(words[i + 1 : i + 2])
            if not value or value.startswith("--"):
                raise ValueError(f"{option} needs a value")
            del words[i : i + 1 + (word == option)]
            return value
    return None


def _without_config(count: int, program: list[str]) -> tuple[Callable[[Any], Any], Any, list[str]]:
    """One process per GPU; or processes on the CPU, of which accelerate's own launcher silently starts one."""
    import torch

    if torch.cuda.is_available():
        from accelerate.commands.launch import launch_command, launch_command_parser

        several = ["--multi_gpu"] if count > 1 else []
        rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return launch_command, launch_command_parser(), ["--num_processes", str(count), *several, *rest, *program]
    from torch.distributed.run import get_args_parser, run

    program += ["--use_cpu", "true"]  # without it the processes would not talk to each other
    return run, get_args_parser(), ["--standalone", "--nproc_per_node", str(count), *program]


def _ended(launch: Callable[[Any], Any], parser: Any, words: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it repeats the children's codes
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the launcher would, with a warning
    for number in HEARD:
        signal.signal(number, _pass_on)
    given = parser.parse_args(words)
    # torch's launcher would take these over, give the processes 30 s, and end with an error whatever they did.
    given.signals_to_handle = "SIGQUIT"
    try:
        launch(given)
    except ChildFailedError as failed:
        return _code([failure.exitcode for failure in failed.failures.values()])
    except subprocess.CalledProcessError as failed:
        return _code([failed.returncode])
    return 0


def _pass_on(number: int, _frame: Any) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _code(codes: Sequence[int]) -> int:
    """2 where a process told of a user's mistake; those that the launcher then ended have the code of a signal."""
    return 2 if 2 in codes else next((code for code in codes if code > 0), 1)
