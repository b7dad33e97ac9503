"""Large tables are checked once and stored as columns in the user's cache, from where every process maps them.

A stored table is found by what it was made of: the files' content, the price list and the rules that read them. It is
there as a whole or not at all; processes that start together wait for the one that makes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from routers.data import billing, catalogue, cells, columns, distinct, files, table_rows, wide
from routers.data.catalogue import Member
from routers.data.columns import Columns, check
from routers.data.files import files_of, read_chunks

logger = logging.getLogger(__name__)

STORED_FROM = 8 << 20
"""Bytes; smaller files are read in a second or two and kept in memory."""
KEPT_DAYS = 30
"""A stored table that nobody has used for longer goes when another is stored."""


def columns_of(paths: Sequence[str | Path], members: Mapping[str, Member], source: str) -> Columns:
    """The columns of files and folders, as one table.

    Raises:
        FileNotFoundError, ValueError: as `routers.data.columns.check`.
    """
    found = [file for path in paths for file in files_of(path)]
    if sum(file.stat().st_size for file in found) < STORED_FROM:
        return check(read_chunks(*found), members, source)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo" / "tables"
    folder = home / _key(found, members)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _store(found, members, source, folder)
            os.utime(folder)
    except OSError as error:
        logger.warning("%s: its columns cannot be stored (%s); they stay in this process's memory", source, error)
        return check(read_chunks(*found), members, source)
    return Columns.load(folder)


def _store(found: Sequence[Path], members: Mapping[str, Member], source: str, folder: Path) -> None:
    for old in folder.parent.iterdir():
        if old.is_dir() and old.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
            shutil.rmtree(old, ignore_errors=True)
    draft = folder.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir()
    try:
        check(read_chunks(*found), members, source, draft)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    logger.info("%s: its columns are stored in %s", source, folder)


def _key(found: Sequence[Path], members: Mapping[str, Member]) -> str:
    digest = hashlib.blake2b(repr(members).encode(), digest_size=16)
    modules = (billing, catalogue, cells, columns, distinct, files, table_rows, wide)
    for path in (*(Path(str(module.__file__)) for module in modules), *found):
        with path.open("rb") as file:
            digest.update(f"{path.name}{hashlib.file_digest(file, 'blake2b').hexdigest()}".encode())
    return digest.hexdigest()
