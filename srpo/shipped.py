"""The recipes that come with the package: `srpo recipes` lists and copies them.

The folder `recipes/` of the repository lies inside the package as `srpo/recipes` (a link in a checkout, files in a
wheel).
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from srpo.cli import Parser

_PACKAGE = Path(str(files("srpo")))
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
_OTHERS = ("accelerate", "catalogues", "slurm")
"""Folders whose YAML files are no recipes."""


def shipped_recipes() -> dict[str, Path]:
    """Name (`quickstart/srpo`) -> file."""
    paths = [path.relative_to(RECIPES) for path in sorted(RECIPES.glob("*/**/*.yaml"))]
    return {path.with_suffix("").as_posix(): RECIPES / path for path in paths if path.parts[0] not in _OTHERS}


def find_recipe(name: str) -> Path:
    """The file of that path; or else the shipped recipe of that name, with or without `.yaml`."""
    if not Path(name).exists():
        known = shipped_recipes().get(name.removesuffix(".yaml").removeprefix("recipes/"))
        if known is not None:
            return known
    return Path(name)


def no_recipe(name: str | Path) -> str:
    """What to say of a recipe that is neither a file nor a shipped one."""
    asked = str(name).removesuffix(".yaml").removeprefix("recipes/")
    near = sorted(shipped_recipes(), key=lambda one: -_likeness(asked, one))[:3]
    return f"{name}: No such file, and no shipped recipe; the nearest are {', '.join(near)}; srpo recipes lists all"


def _likeness(asked: str, name: str) -> float:
    """Of a name, or of its last part where only that was asked."""
    names = [name, name.rpartition("/")[2]]
    return max(difflib.SequenceMatcher(None, asked, one).ratio() for one in names)


def shipped_path(value: Any) -> Any:
    """A path of a recipe below `recipes/`: in the working directory, or else the shipped file."""
    if isinstance(value, str) and value.startswith("recipes/") and not Path(value).exists():
        shipped = RECIPES / value.removeprefix("recipes/")
        return str(shipped) if shipped.exists() else value
    return value


def first_sentence(path: Path) -> str:
    """Of a recipe's comment: it says what the recipe is."""
    lines = [line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return re.split(r"[.:](?:\s|$)", " ".join(takewhile(bool, lines)))[0]


def main(argv: Sequence[str] | None = None) -> None:
    """`srpo recipes`: list, copy, keys."""
    parser = Parser(
        description="List the shipped recipes, copy one, or print a table of all keys.",
        epilog="example: srpo recipes copy quickstart/srpo my.yaml && srpo train my.yaml",
    )
    does = parser.add_subparsers(dest="action", metavar="{list,copy,keys}")
    does.add_parser("list", help="the shipped recipes (the default)")
    copy = does.add_parser("copy", help="copy a shipped recipe")
    copy.add_argument("name", help="as listed, such as quickstart/srpo")
    copy.add_argument("file", nargs="?", type=Path, help="default: the recipe's own file name, here")
    does.add_parser("keys", help="every key of a recipe as Markdown: recipes/KEYS.md")
    args = parser.parse_args(argv)
    if args.action == "copy":
        _copy(args.name, args.file)
    elif args.action == "keys":
        from srpo.help import keys_table

        print(keys_table(), end="")
    else:
        for name, path in shipped_recipes().items():
            print(f"{name:42} {first_sentence(path)}")


def _copy(name: str, file: Path | None) -> None:
    source = shipped_recipes().get(name.removesuffix(".yaml"))
    if source is None:
        raise ValueError(no_recipe(name))
    target = Path(source.name) if file is None else file / source.name if file.is_dir() else file
    if target.exists():
        raise ValueError(f"{target} exists already: name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)
