"""Compare what is installed with a lock; used by scripts/setup.sh.

    python scripts/locked_versions.py constraints.txt

Exit code 1, and a line per package, where one is not in the lock or has another version.
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

NOT_LOCKED = {"pip", "setuptools", "srpo"}
"""pip and setuptools come with Python's venv; srpo is this checkout."""


def differences(lock: str, installed: dict[str, str]) -> list[str]:
    """One line per installed package that the text of a constraints file does not pin to what is installed.

    A local build (`2.13.0+cpu`) is the pinned version.

    Args:
        installed: canonical name -> version.
    """
    pinned: dict[str, Requirement] = {}
    for line in lock.splitlines():
        text = line.split("#")[0].strip()
        if text and ((one := Requirement(text)).marker is None or one.marker.evaluate()):
            pinned[canonicalize_name(one.name)] = one
    found = []
    for name, version in sorted(installed.items()):
        if name in NOT_LOCKED:
            continue
        if name not in pinned:
            found.append(f"{name} {version} is installed, and the lock does not name it: run scripts/lock.sh")
        elif Version(version) not in pinned[name].specifier:
            found.append(f"{name} {version} is installed, and the lock says {pinned[name].specifier}")
    return found


def main() -> int:
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    found = differences(Path(sys.argv[1]).read_text(encoding="utf-8"), installed)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
