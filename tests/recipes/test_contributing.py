"""The worked examples of CONTRIBUTING.md, executed on a copy of the packages, with the number of files they touch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {"An objective": 2, "A reward": 2, "An environment": 2, "A baseline": 1, "A metric": 1}


def sections() -> dict[str, list[str]]:
    """Heading -> its Python blocks."""
    parts = re.split(r"^## (.+)$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {name: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for name, text in found}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("srpo", "routers", "rewards"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("name", list(FILES))
def test_a_worked_example_runs(name: str, copy: Path) -> None:
    touched, checks = set(), []
    for block in sections()[name]:
        first, body = block.split("\n", 1)
        if match := re.fullmatch(r"# new file: (\S+)", first):
            assert not (copy / match[1]).exists()
            (copy / match[1]).write_text(body, encoding="utf-8")
            touched.add(match[1])
        elif match := re.fullmatch(r"# (\S+), after: (.+)", first):
            text = (copy / match[1]).read_text(encoding="utf-8")
            assert text.count(f"\n{match[2]}\n") == 1, f"{match[1]} has no single line {match[2]!r}"
            changed = text.replace(f"\n{match[2]}\n", f"\n{match[2]}\n{body}")
            (copy / match[1]).write_text(changed, encoding="utf-8")
            touched.add(match[1])
        else:
            assert first == "# then", first
            checks.append(body)
    assert len(touched) == FILES[name] and checks
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-c", "\n".join(checks)]
    run = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
