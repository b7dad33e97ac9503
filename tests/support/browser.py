"""A real browser, where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


def browsed(address: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """(the page as it stands after its scripts, what its console says)"""
    browser = chromium()
    assert browser is not None
    own = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    command = [browser, *own, *flags, "--dump-dom", address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "</html>" in ran.stdout
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
