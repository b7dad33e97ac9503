"""One training step walks through few files: a newcomer can follow it. Upper bounds, a little above what is measured.

Moves vary by a few with the threads on which episodes live.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "files", "moves"),
    [("quickstart/srpo", 44, 215), ("quickstart/think_route", 46, 560), ("quickstart/bopo", 51, 1420)],
)
def test_a_step_does_not_jump_among_files(recipe: str, files: int, moves: int) -> None:
    run = subprocess.run(
        [sys.executable, "scripts/benchmark_trace.py", recipe], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.search(r"^(\d+) files of [\d,]+ lines, ([\d,]+) moves", run.stdout, re.M)
    assert found is not None
    assert int(found[1]) <= files and int(found[2].replace(",", "")) <= moves, found[0]
