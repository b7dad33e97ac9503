"""Where an evaluation writes: never over the results of a run, and over its own only if they were made from the same.

evaluation.parquet   evaluation.parquet.made_from.json   what was evaluated, on what, how
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo.run.derived import made_of
from srpo.run.files import FolderTaken
from srpo.run.folder import run_of


def check_results(folder: Path, result: str, values: Mapping[str, Any]) -> None:
    """Raise FolderTaken where writing `result` into the folder would replace something else.

    Args:
        values: of `srpo.run.derived.made_from`; `srpo.run.derived.mark` writes them beside the result.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderTaken(f"{folder} is a file: name a folder for the results")
    if run_of(folder) is not None:
        raise FolderTaken(f"{folder} holds a training run, whose {result} this would replace: name another folder")
    path = folder / result
    if not path.exists():
        return
    then = made_of(path)
    if then is None:
        raise FolderTaken(f"{path} exists, and nothing says what it was made from: name another folder, or move it")
    changed = sorted(key for key in {*then, *values} if then.get(key) != values.get(key))
    if changed:
        raise FolderTaken(
            f"{path} was made with {changed[0]}={then.get(changed[0])!r}, now it is {values.get(changed[0])!r}: name "
            "another folder, or move it"
        )
