"""Loading ALFWorld's own games: its `game.tw-pddl` files, and many of them packed into one jsonl (or jsonl.xz).

Users download them with `alfworld-download` of the package `alfworld`, and pack the folder that it makes with
`python -m routers.environments.alfworld.games FOLDER OUT.jsonl.xz`.
"""

import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from routers.data.files import BadRow, format_of, read_rows
from routers.environments.alfworld.facts import Game
from routers.environments.alfworld.pddl import parse_problem
from routers.environments.protocol import GameError
from srpo.quarantine import BadRows, Quarantine

GAME_FILE = "game.tw-pddl"
_TASK = re.compile(r"Your task is to: ([^\"\n\\]+)")


def load_game(path: str | Path) -> Game:
    """One `game.tw-pddl`, as the official package writes it."""
    return _game(_row(Path(path), Path(path).parent), str(path))


def load_games(path: str | Path, count: int | None = None) -> list[Game]:
    """The first `count` games of a packed file or of a folder of `game.tw-pddl` files (sorted; the solvable ones).

    A packed row has id, task ("Your task is to: ..."), walkthrough and problem (PDDL text); other fields are ignored.
    Games that cannot be played are left out with a warning that names them.

    Raises:
        GameError: no such file, no games in it, or a share of bad ones above `srpo.quarantine.MAX_BAD_SHARE`.
    """
    path = Path(path).expanduser()
    games: list[Game] = []
    bad = Quarantine(f"games of {path}", label=f"{path.name}: ")
    for number, read in _games(path):
        if count is not None and len(games) == count:
            break
        try:
            games.append(read())
        except GameError as error:
            bad.add(number, "no game", str(error), "")
    if not games and not bad:
        raise GameError(f"{path}: no games in it")
    try:
        bad.settle(len(games) + len(bad))
    except BadRows as error:
        raise GameError(str(error)) from None
    return games


def convert(folder: str | Path, out: str | Path) -> int:
    """Pack every solvable `game.tw-pddl` below `folder` into `out` (.jsonl or .jsonl.xz). Returns how many.

    Every game is parsed on the way, so a file that could not be played is named now and not in the middle of a run.
    """
    out = Path(out)
    if not Path(folder).is_dir():
        raise GameError(f"{folder}: not a folder")
    count = 0
    with _open(out, "wt") as file:
        for path in sorted(Path(folder).rglob(GAME_FILE)):
            row = _row(path, Path(folder))
            if row.pop("solvable"):
                _game(row, str(path))
                file.write(json.dumps(row) + "\n")
                count += 1
    if not count:
        out.unlink()
        raise GameError(f"{folder}: no solvable {GAME_FILE} below it")
    return count


def _games(path: Path) -> Iterator[tuple[int, Callable[[], Game]]]:
    """Number and reader of every solvable game."""
    if path.is_dir():
        for number, file in enumerate(sorted(path.rglob(GAME_FILE)), start=1):
            try:
                row = _row(file, path)
            except GameError as error:
                yield number, partial(_fail, str(error))
                continue
            if row["solvable"]:
                yield number, partial(_game, row, str(file))
        return
    if format_of(path) != ".jsonl":
        raise GameError(f"{path}: expected a folder, .jsonl or .jsonl.xz")
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise GameError(str(error)) from None
    for number, row in rows:
        yield number, partial(_packed, row)


def _fail(message: str) -> Game:
    raise GameError(message)


def _packed(row: Any) -> Game:
    if isinstance(row, BadRow):
        raise GameError(row.detail)
    if not isinstance(row, dict):
        raise GameError(f"expected a JSON object, found {type(row).__name__}")
    for key, kind in {"id": str, "task": str, "walkthrough": list, "problem": str}.items():
        if not isinstance(row.get(key), kind):
            raise GameError(f"field {key!r} must be a {kind.__name__}, it is {row.get(key)!r:.80}")
    return _game(row, str(row["id"]))


def _row(file: Path, root: Path) -> dict[str, Any]:
    """The packed row of a game file."""
    data = _json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    for key in ("grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameError(f"{file}: field {key!r} must be a str, it is {data.get(key)!r:.80}")
    task = _TASK.search(data["grammar"])
    if task is None:
        raise GameError(f"{file}: field 'grammar' has no line 'Your task is to: ...'")
    return {
        "id": file.parent.relative_to(root).as_posix(),
        "task": f"Your task is to: {task[1]}",
        "walkthrough": data.get("walkthrough") or [],
        "problem": data["pddl_problem"],
        "solvable": data.get("solvable", True),
    }


def _game(row: dict[str, Any], where: str) -> Game:
    facts = parse_problem(row["problem"], where)
    return Game(row["id"], row["task"].removeprefix("Your task is to: "), tuple(row["walkthrough"]), facts)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise GameError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise GameError(f"{where}: expected a JSON object, found {type(data).__name__}")
    return data


def _open(path: Path, mode: str) -> Any:
    if path.suffixes[-2:] == [".jsonl", ".xz"]:
        return lzma.open(path, mode, encoding="utf-8")
    if path.suffix == ".jsonl":
        return path.open(mode, encoding="utf-8")
    raise GameError(f"{path}: expected a folder, .jsonl or .jsonl.xz")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m routers.environments.alfworld.games FOLDER OUT.jsonl.xz")
    print(f"{convert(sys.argv[1], sys.argv[2])} games in {sys.argv[2]}")
