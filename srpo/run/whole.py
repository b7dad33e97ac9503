"""A checkpoint appears whole or not at all: written beside, listed with its hashes, renamed; only whole ones are seen.

    OUTPUT/_saving/checkpoint-12/...             where all processes write
    OUTPUT/_saving/checkpoint-12/manifest.json   written last: bytes and sha256 of every file
    OUTPUT/checkpoint-12                         the same folder, renamed once all of it is on the disk

Older checkpoints go only after that, through `_saving` too, so that no name of a checkpoint ever stands for a part.

The policy that a run ends with lies in OUTPUT itself, among much else. Its manifest lists the policy's files alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from srpo.run.processes import Refused, main_process
from srpo.run.steps import checkpoint_step

MANIFEST = "manifest.json"
SAVING = "_saving"
AUTO = ("auto", "true", "True", True)
"""Values of `resume_from_checkpoint` that mean the newest whole checkpoint."""
_THREADS, _REMEMBERED = 8, 2**14

Entry = tuple[int, str]
"""Bytes and sha256 of a file."""


class NotWhole(Refused):
    """A checkpoint that is no whole one; names the file."""


# ------------------------------------------------------------------------------------------------------------- writing


def seal(folder: Path, known: Mapping[str, Entry] | None = None, only: Iterable[str] = ()) -> None:
    """Bring all files of a folder to the disk and write its manifest, which makes it whole.

    Args:
        known: entries of files that need not be read again.
        only: patterns of the files at its top that count; none: all, in folders too.
    """
    names, wanted = _files(folder), [*only]
    if wanted:
        names = [name for name in names if "/" not in name and matches(name, wanted)]
    read = [name for name in names if name not in (known or {})]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(read, pool.map(lambda name: _flushed(folder / name), read), strict=True))
    files = {name: (found if name in found else known or {})[name] for name in names}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(manifest(files), encoding="utf-8")
    _flushed(draft)
    draft.replace(folder / MANIFEST)
    for place in {folder, *(path.parent for path in map(folder.joinpath, names))}:
        _flush_folder(place)


def manifest(files: Mapping[str, Entry]) -> str:
    """What stands in the manifest of a folder that holds these."""
    return json.dumps({"files": files, "check": _check(files)}, indent=1) + "\n"


def put_in_place(draft: Path, folder: Path) -> None:
    """Give a sealed folder its name; what had it is taken away."""
    if folder.exists():
        _take_away(folder)
    draft.rename(folder)
    _flush_folder(folder.parent)


def rotate(output: Path, limit: int | None, best: str | None) -> None:
    """Take away the oldest whole checkpoints beyond `limit`, never the newest one or `best`."""
    if not limit or limit < 1:
        return
    found = list(whole_looking(output).values())
    kept = {found[-1], *(path for path in found if best is not None and path.name == Path(best).name)} if found else {}
    excess = len(found) - max(limit, len(kept))
    for path in [path for path in found if path not in kept][: max(excess, 0)]:
        _take_away(path)


def _take_away(folder: Path) -> None:
    aside = folder.parent / SAVING / f"old-{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flushed(path: Path) -> Entry:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path.stat().st_size, sha256_of(path)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------- reading


def fault(folder: Path, only: Iterable[str] = ()) -> str | None:
    """Why a folder is no whole checkpoint, naming the file; None: it is one, to the last bit.

    Args:
        only: patterns of the files that matter (of a policy that is served); none: all, and there may be no others.
    """
    try:
        files = read_manifest(folder)
    except FileNotFoundError:
        return (
            f"{folder / MANIFEST} is missing: another tool or an older version wrote this checkpoint, or it is not "
            "whole"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} is damaged ({type(error).__name__})"
    found, wanted = set(_files(folder)), [*only]
    if wanted:
        files = {name: entry for name, entry in files.items() if matches(name, wanted)}
        found &= {*files}
    for name in sorted({*files} ^ found):
        return f"{folder / name} is {'missing' if name in files else f'none of its files ({MANIFEST} has no such)'}"
    for name, (size, _) in files.items():
        if (there := (folder / name).stat().st_size) != size:
            return f"{folder / name} has {there:,} bytes, and {size:,} were written: it was cut or changed"
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: sha256_of(folder / name), files)
        for (name, (_, digest)), there_now in zip(files.items(), digests, strict=True):
            if there_now != digest:
                return f"{folder / name} does not hold what was written: its sha256 is another one"
    return None


def read_manifest(folder: Path) -> dict[str, Entry]:
    """File -> entry. Raises OSError, ValueError or KeyError where there is none, or a damaged one."""
    document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in document["files"].items()}
    if document["check"] != _check(files):
        raise ValueError("it says other things than were written")
    return files


def whole_looking(output: Path) -> dict[int, Path]:
    """Step -> checkpoint, by step: those with a manifest, whose files are not looked at."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match and (path / MANIFEST).is_file()))


def newest(output: Path, say: Callable[[str], object] = print) -> Path | None:
    """The newest whole checkpoint of a folder, or None; newer ones that are not are `say`d, with the reason."""
    draft_of = re.compile(r"checkpoint-\d+")
    for draft in sorted((output / SAVING).glob("checkpoint-*")):  # killed between its manifest and its name
        if draft_of.fullmatch(draft.name) and not (output / draft.name).exists() and fault(draft) is None:
            put_in_place(draft, output / draft.name)
    numbers = (path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*") if path.is_dir())
    for step in sorted((int(number) for number in numbers if number.isdecimal()), reverse=True):
        path = output / f"checkpoint-{step}"
        if (why := fault(path)) is None:
            return path
        say(f"checkpoint-{step} is passed over: {why}")
    return None


def resume_from(given: str | bool | None, output: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, looked at to the last bit by the main process; None: none.

    Raises:
        NotWhole: on every process: the named checkpoint is none, or `true` finds none (`auto` then starts anew).
    """
    if given is None or given is False:
        return None

    def look() -> str | None:
        if given in AUTO:
            found = newest(Path(output), lambda text: print(f"[resume] {text}", flush=True))
            if found is None and given != "auto":
                raise NotWhole(f"resume_from_checkpoint: {output} holds no whole checkpoint")
            print(f"[resume] {'nothing to resume: from the start' if found is None else found}", flush=True)
            return None if found is None else str(found)
        checkpoint_step(Path(str(given)))
        if (why := fault(Path(str(given)))) is not None:
            others = ", ".join(map(str, whole_looking(Path(str(given)).parent).values()))
            raise NotWhole(f"resume_from_checkpoint: {why}" + (f"; there are {others}" if others else ""))
        return str(given)

    found: str | None = main_process(look, NotWhole)
    return found


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in found) if name != MANIFEST)


def _check(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is of one of these patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


_digests: dict[tuple[Path, int, int], str] = {}


def sha256_of(path: Path) -> str:
    """A file is read once: what was hashed when it was written, or looked at, is remembered until it changes."""
    state = _state(path)
    if state not in _digests:
        if len(_digests) >= _REMEMBERED:
            _digests.clear()
        with path.open("rb") as stream:
            _digests[state] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[state]


def _state(path: Path) -> tuple[Path, int, int]:
    about = path.stat()
    return path, about.st_size, about.st_mtime_ns
