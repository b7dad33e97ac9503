"""How a script ends: mistakes with one line and code 2, faults with a traceback; each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ended(body: str, *flags: str) -> tuple[int, str]:
    code = f"import sys\nfrom srpo.cli import run\nfrom srpo.recipe import load_recipe\n{body}\nrun(main)"
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("from srpo.run.folder import *\ndef main(): load_recipe(RunArguments, ['--config=no.yaml'])", "no.yaml: No"),
        ("from srpo.ranges import *\ndef main(): check_number('n', 0, above(0))", "n=0: must be above 0"),
        ("def main(): open('nowhere/at/all')", "nowhere/at/all: No such file or directory"),
        ("def main(): raise OSError('two\\nlines')", "two lines"),
        ("def main(): import uvicorn_of_nobody", "No module named 'uvicorn_of_nobody': pip install uvicorn_of_nobody"),
    ],
)
def test_a_mistake_is_one_line(body: str, words: str) -> None:
    code, err = ended(body)
    assert code == 2 and err.startswith("error: ") and words in err and len(err.splitlines()) == 1, err


def test_a_fault_keeps_its_traceback_and_a_number_is_the_code() -> None:
    for body in ("def main(): int('x')", "def main(): {}['key']", "def main(): list(zip([1], [], strict=True))"):
        code, err = ended(body)
        assert code == 1 and "Traceback" in err, err
    code, err = ended("from srpo.ranges import *\ndef main(): check_number('n', 0, above(0))", "-X", "dev")
    assert code == 1 and "Traceback" in err and "n=0" in err
    assert ended("def main(): return 3") == (3, "") and ended("def main(): return 'a table'") == (0, "")
