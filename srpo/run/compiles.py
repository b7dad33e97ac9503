"""Locks of torch's compiler that a killed process has left: whoever needs that extension next waits for ever.

DeepSpeed compiles its operators when a run begins, in a folder that all runs share, and torch waits there for as long
as a file named `lock` exists. The process that made it keeps it open.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

SECONDS = 600.0
"""A lock that no process here has open may be another machine's, where homes are shared; none compiles longer."""


def free_deepspeed(environment: Mapping[str, str] = os.environ) -> None:
    """Before DeepSpeed starts: take stale locks away, by the first process of a machine; one that is too young to be
    sure of is named. Both are warnings."""
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true" or environment.get("LOCAL_RANK", "0") != "0":
        return
    from torch.utils.cpp_extension import get_default_build_root  # few runs need it

    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in locks_without_owner(root):
        age = time.time() - lock.stat().st_mtime
        if age < SECONDS:
            logger.warning(
                "%s is of a compiler that no process of this machine runs: if this run does not begin, delete it", lock
            )
            continue
        lock.unlink(missing_ok=True)
        logger.warning("%s was left %.0f minutes ago by a process that has died: taken away", lock, age / 60)


def locks_without_owner(root: Path) -> Iterator[Path]:
    """Locks in the folders of torch's extensions that no process has open, as far as this user can see."""
    found = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not found:
        return
    held = set()
    for process in psutil.process_iter():
        try:
            held |= {file.path for file in process.open_files()}
        except psutil.Error:
            continue  # somebody else's, or gone
    yield from (lock for lock in found if str(lock.resolve()) not in held)
