"""Which versions of the packages below us were tested: the ranges of our own metadata, both ends of which tests run.

Outside a range something private may have moved (a hook of TRL's, the name of a cache, an adapter's layout), so the
import says so once, and names both versions. Another minor version of TRL
is an error, in `srpo/__init__.py`.
"""

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

SEAMS = ("accelerate", "deepspeed", "peft", "torch", "transformers", "vllm")
"""Packages whose private seams or renamed arguments we use."""


def tested_ranges() -> dict[str, Requirement]:
    """Package -> range, as the installed metadata of srpo says; empty where srpo is not installed but on the path."""
    try:
        lines = requires("srpo") or []
    except PackageNotFoundError:
        return {}
    ranges = [Requirement(line) for line in lines]
    return {one.name: one for one in ranges if one.name in SEAMS and len(one.specifier)}


def outside(ranges: dict[str, Requirement]) -> list[str]:
    """One phrase per installed package that is outside its range; packages that are not installed are left out."""
    found = []
    for name, one in sorted(ranges.items()):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not one.specifier.contains(installed, prereleases=True):
            bounds = ", ".join(sorted(map(str, one.specifier), reverse=True))
            found.append(f"{name} {installed} (tested: {bounds})")
    return found


def warn_outside(own: str) -> None:
    """One warning for all packages outside their tested range. `own`: our version."""
    if found := outside(tested_ranges()):
        warnings.warn(
            f"srpo {own} was not tested with {'; '.join(found)}: results may differ without an error. "
            "`pip install srpo` in a new environment, or constraints.txt of the repository, gives tested versions.",
            stacklevel=3,
        )
