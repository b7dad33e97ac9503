"""A small world for tests that need AppWorld itself; they are skipped where it is not installed."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

PYTHON = os.environ.get("APPWORLD_PYTHON")


def make_world(folder: Path) -> None:
    """Put the data of `appworld_world` into a folder. Skips the test where APPWORLD_PYTHON is not set."""
    if PYTHON is None:
        pytest.skip("AppWorld is not installed: see routers/environments/appworld.py, and set APPWORLD_PYTHON")
    shutil.copytree(_made(), folder, dirs_exist_ok=True)


@functools.cache
def _made() -> Path:
    """Once per process: it takes ten seconds."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run([str(PYTHON), str(Path(__file__).with_name("appworld_world.py")), str(folder)], check=True)
    return folder
