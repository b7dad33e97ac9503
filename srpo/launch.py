"""`srpo train --processes 8 --accelerate fsdp2`: accelerate's launcher, in this process.

The launcher's own command ends with exit code 1 and, for several processes, with a traceback of its own whatever the
processes said; here its result is theirs: one line and code 2 after a mistake of the user.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from typing import Any

from srpo.shipped import RECIPES, find_recipe


def launched(command: str, words: list[str]) -> int | None:
    """Run `srpo.COMMAND` in the processes that `--processes` and `--accelerate` ask for, and return the exit code.

    Both options are taken out of `words`. None: neither is there, and the caller goes on alone.
    """
    config, count = _taken("--accelerate", words), _taken("--processes", words)
    if config is None and count is None:
        return None
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"--processes {count}: must be a whole number, at least 1")
    options: list[str] = []
    if config is not None:
        shipped = RECIPES / "accelerate" / f"{config}.yaml"
        path = shipped if shipped.is_file() else find_recipe(config)
        if not path.is_file():
            known = ", ".join(sorted(one.stem for one in (RECIPES / "accelerate").glob("*.yaml")))
            raise ValueError(f"--accelerate {config}: neither a file nor one of {known}")
        options = ["--config_file", str(path)]
    if count is not None:
        options += ["--num_processes", count]
    return _launch([*options, *_defaults(config, count), "--module", f"srpo.{command}", *words])


def _taken(option: str, words: list[str]) -> str | None:
    for i, word in enumerate(words):
        if word == option or word.startswith(f"{option}="):
            value = word.partition("=")[2] or " ".join(words[i + 1 : i + 2])
            if not value or value.startswith("--"):
                raise ValueError(f"{option} needs a value")
            del words[i : i + 1 + (word == option)]
            return value
    return None


def _defaults(config: str | None, count: str | None) -> list[str]:
    """What the launcher would warn that it assumes."""
    if config is not None:
        return []
    import torch

    several = [] if count == "1" else ["--multi_gpu"] if torch.cuda.is_available() else ["--multi_cpu"]
    return [*several, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def _launch(words: Sequence[str]) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it repeats the children's codes
    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as failed:
        return _code([failure.exitcode for failure in failed.failures.values()])
    except subprocess.CalledProcessError as failed:
        return _code([failed.returncode])
    return 0


def _code(codes: Sequence[Any]) -> int:
    """2 where a process was told of a user's mistake; those that the launcher then ended have the code of a signal."""
    return 2 if 2 in codes else next((code for code in codes if code > 0), 1)
