"""A lock that a killed compiler has left is taken away; one that is held, or may be another machine's, is not."""

import os
import subprocess
import sys
import time
from pathlib import Path

from srpo.run.compiles import SECONDS, free_deepspeed

HOLD = """
import sys
from torch.utils.file_baton import FileBaton
print(FileBaton(sys.argv[1]).try_acquire(), flush=True)
input()
"""


def test_a_killed_process_s_lock_is_taken_away_and_a_living_one_s_is_not(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "py_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock, environment = folder / "lock", {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    free_deepspeed(environment)  # nothing is there
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **pipes) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"True\n"
        old = time.time() - SECONDS - 60
        os.utime(lock, (old, old))
        free_deepspeed(environment)
        assert lock.exists() and not caplog.records
        holder.kill()
    os.utime(lock)
    free_deepspeed(environment)
    assert lock.exists() and "delete it" in caplog.text, "young: another machine's, where homes are shared"
    os.utime(lock, (old, old))
    free_deepspeed(environment | {"LOCAL_RANK": "1"})
    free_deepspeed({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert lock.exists(), "one process of a machine does it, and only where DeepSpeed will compile"
    free_deepspeed(environment)
    assert not lock.exists() and "a process that has died: taken away" in caplog.text
