"""One of two processes dies, raises or hangs anywhere in a run: both end, the cause is the last word, nothing is lost.

Real processes (gloo) and real signals, in whole trainings; tests/srpo/test_watch.py has the rules by themselves. The
slow part is the rest of the matrix, and what launchers make of a fault.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fault_cases
import pytest
from fault_cases import AT, CASES, NET, WRITERS, Ended, two

from srpo.run.whole import newest

pytestmark = pytest.mark.distributed
FAST = ("dies in loss", "raises in reward")


def ended_with_its_cause(case: str, found: Ended) -> None:
    kind, place = case.replace("hangs in C", "hangs").split(" in ")
    guilty = int(place not in WRITERS)
    place = "evaluation, reward" if place == "evaluation" else place
    assert found.seconds < NET and 0 not in found.codes, found.text
    last = "\n".join(found.text.strip().splitlines()[-4:])
    if kind == "dies":
        assert found.codes[guilty] == -signal.SIGKILL
        assert f"process {guilty} has died (killed, or out of memory?), last seen in: {place}" in last
    elif kind == "raises":
        assert found.codes == [1, 1]
        assert "RuntimeError: planted" in last and last.endswith(f"process {guilty} of 2, in: {place}")
        assert found.text.count("Traceback") == 1, "another process has said something too"
    else:
        assert found.codes[guilty] in (1, -signal.SIGKILL)
        assert re.search(
            rf"nothing moves within hang_deadline \(10 s\): process {guilty}: {place}, for \d+ s, at ", last
        )
        assert "fault_cases.py" in last


def checkpoint_is_left(found: Ended, step: int = AT - 1) -> None:
    assert newest(found.folder) == found.folder / f"checkpoint-{step}"


@pytest.mark.parametrize("case", FAST)
def test_both_end_and_say_why(tmp_path: Path, case: str) -> None:
    found = two(tmp_path, case)
    ended_with_its_cause(case, found)
    checkpoint_is_left(found)
    if case.startswith("dies"):
        assert two(tmp_path, "").codes == [0, 0], "the run goes on from it"
        checkpoint_is_left(found, 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in (*CASES, "hangs in C in reward") if case not in FAST])
def test_everywhere_else(tmp_path: Path, case: str) -> None:
    found = two(tmp_path, case)
    ended_with_its_cause(case, found)
    checkpoint_is_left(found, AT + 1 if case.endswith("push") else AT - 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_engines_end_and_go_on_alike(tmp_path: Path, engine: str) -> None:
    for case in ("raises in loss", "hangs in loss", "dies in loss"):
        found = two(tmp_path / case[:4], case, engine)
        ended_with_its_cause(case, found)
        checkpoint_is_left(found)
    assert two(found.folder, "", engine).codes == [0, 0], "the run goes on from it"
    checkpoint_is_left(found, 4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_end_with_the_first_traceback(tmp_path: Path, launcher: str) -> None:
    module = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ],
    }[launcher]
    script = str(Path(fault_cases.__file__).resolve())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", *module, script, "launched", "raises in reward", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "gloo" not in said.rpartition("RuntimeError: planted")[2]
    table = said[said.rindex("Root Cause") :]
    assert "RuntimeError: planted" in table and "process 1 of 2, in: reward" in table
    assert re.search(r"rank\s+: 1 ", table)
