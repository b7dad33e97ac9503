"""Rows out of users' files: the one reader of parquet, JSON and separated text, plain or compressed.

A row that cannot be read is returned as a `BadRow` with its reason, so that the caller can leave it out and name it
(`srpo.quarantine`). What is wrong with a whole file is one error that names it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
_SAME = {".pq": ".parquet", ".ndjson": ".jsonl", ".tab": ".tsv"}
_PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
_OTHER_FILES = (
    ".txt",
    ".arrow",
    ".feather",
    ".xls",
    ".xlsx",
    ".zip",
    ".zst",
    ".yaml",
    ".yml",
    ".pkl",
    ".sqlite",
    ".db",
)
_SEPARATORS = (",", ";", "\t", "|")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is no UTF-8, after decoding with surrogateescape


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    reason: str
    detail: str
    content: str = ""


class Row(NamedTuple):
    """A row of a file and its number: the line of JSON lines, else counted from 1, without the header."""

    number: int
    value: Any


def format_of(path: str | Path) -> str | None:
    """The format that a file's name says (one of `FORMATS`), whatever it is packed in; None: no known one."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    last = _SAME.get(last, last)
    return last if last in FORMATS else None


def names_a_file(source: str | Path) -> bool:
    """Whether this is a file or folder here, or says that it should be one: then it is no id of the Hub."""
    text, path = str(source), Path(source)
    if isinstance(source, Path) or path.exists() or path.is_absolute() or text.startswith(("~", ".")):
        return True
    suffix = path.suffix.lower()
    known = format_of(path) is not None or suffix in _OTHER_FILES or suffix in _PACKED
    return known or "\\" in text or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, or of the files in a folder; a row that cannot be read has a `BadRow` for its value.

    Blank lines and rows without any value are skipped. Text is UTF-8 (or UTF-16 with its mark); the separator of
    .csv and .tsv is found in the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file as a whole cannot be read; the message names it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and format_of(file)]
        if not files:
            raise ValueError(f"{path}: this folder holds no {', '.join(FORMATS)} file")
        rows = [row.value for file in files for row in read_rows(file)]
        return [Row(number, value) for number, value in enumerate(rows, start=1)]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    kind = format_of(path)
    if kind is None:
        packed = " or ".join(_PACKED)
        raise ValueError(f"{path}: its name says no format; there are {', '.join(FORMATS)}, packed as {packed} or not")
    data = _unpacked(path)
    if kind == ".parquet":
        return [Row(number, value) for number, value in enumerate(_parquet(path, data), start=1)]
    text, broken = _decoded(data)
    reader = {".jsonl": _json_lines, ".json": _json}.get(kind, _separated)
    rows_read = reader(path, text)
    return list(rows_read) if broken is None else [_checked_bytes(row, broken) for row in rows_read]


def _unpacked(path: Path) -> bytes | None:
    """The file's content; None for a plain parquet file, which is read in place."""
    unpack = _PACKED.get(path.suffix.lower())
    if unpack is None and format_of(path) == ".parquet":
        return None
    data = path.read_bytes()
    try:
        return data if unpack is None else unpack(data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path}: is not a whole {path.suffix.lower()} file ({error})") from None


def _parquet(path: Path, data: bytes | None) -> list[dict[str, Any]]:
    import pyarrow as pa  # here, because reading rows from memory should not need arrow
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path if data is None else pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None
    return rows


def _decoded(data: bytes | None) -> tuple[str, str | None]:
    """The text of a file; and, where bytes are no UTF-8, words that name the first, for the rows that hold one."""
    data = data or b""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "surrogatepass"), None
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        first = f"the file's first is byte {error.start}, in line {line}"
        return data.decode("utf-8", "surrogateescape"), first


def _checked_bytes(row: Row, first: str) -> Row:
    found = _ESCAPED.search(_texts(row.value))
    if found is None:
        return row
    byte = f"0x{ord(found[0]) - 0xDC00:02X}"
    detail = f"byte {byte} is not UTF-8 ({first}); save the file as UTF-8"
    return Row(row.number, BadRow("not UTF-8", detail, repr(row.value)))


def _texts(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, BadRow):
        return value.content
    if isinstance(value, Mapping):
        return "".join(map(_texts, (*value.keys(), *value.values())))
    return "".join(map(_texts, value)) if isinstance(value, (list, tuple)) else ""


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(), which also cuts at U+2028
        if line.strip():
            try:
                yield Row(number, _loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(number, BadRow("not JSON", f"is not JSON: {error}", line))


def _json(path: Path, text: str) -> Iterator[Row]:
    """A list of rows, a mapping of columns, `{"data": rows}`, or JSON lines under another name."""
    try:
        found = _loads(text)
    except (ValueError, RecursionError) as error:
        lines = list(_json_lines(path, text))
        if text.lstrip()[:1] == "[" or not any(isinstance(row.value, dict) for row in lines):
            raise ValueError(f"{path}: is not JSON: {error}") from None
        yield from lines
        return
    if isinstance(found, dict) and len(found) == 1 and isinstance(rows := next(iter(found.values())), list):
        found = rows
    elif isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        found = _from_columns(path, found)
    if not isinstance(found, list):
        found = [found]
    yield from (Row(number, value) for number, value in enumerate(found, start=1))


def _from_columns(path: Path, columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: its columns differ in length: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_mapping)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is written twice")
    return found


def _separated(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), min(len(text) + 1, sys.maxsize)))  # long replies are no fault
    lines = list(io.StringIO(text, newline=""))
    while lines and not lines[0].strip():
        lines.pop(0)
    separator = None
    if lines and (mark := re.fullmatch(r"sep=(.)\s*", lines[0], re.IGNORECASE)):  # Excel's own first line
        separator = mark[1]
        lines.pop(0)
    if not lines:
        return
    separator = separator or _separator(lines[0], "\t" if format_of(path) == ".tsv" else ",")
    records = _records(lines, separator)
    first = next(records)
    if isinstance(first, BadRow):
        raise ValueError(f"{path}: the header {first.detail}")
    header = [name.strip() for name in first]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} stands twice in the header; rename or remove one")
    number = 0
    for record in records:
        if isinstance(record, BadRow):
            number += 1
            yield Row(number, record)
        elif any(cell.strip() for cell in record):
            number += 1
            if len(record) == len(header):
                yield Row(number, dict(zip(header, record, strict=True)))
            else:
                detail = f"has {len(record)} cells, the header has {len(header)}"
                yield Row(number, BadRow("wrong number of cells", detail, separator.join(record)))


def _separator(header: str, usual: str) -> str:
    def cells(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator), []))

    return max((usual, *_SEPARATORS), key=cells)  # the first of equals


def _records(lines: Sequence[str], separator: str) -> Iterator[list[str] | BadRow]:
    """Records, of one line or, in quotes, of several. Where quotes do not close, only that line is bad."""
    start, width = 0, None
    while start < len(lines):
        reader, position = csv.reader(_from(lines, start), delimiter=separator, strict=True), start
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                yield BadRow("broken quotes", f"has broken quotes: {error}", lines[position])
                break
            if record is None:
                return
            end = start + reader.line_num
            width = len(record) if width is None else width
            if end - position > 1 and len(record) != width:  # a quote that never closed took other rows with it
                yield BadRow(
                    "broken quotes", f"opens a quote and has {len(record)} cells, not {width}", lines[position]
                )
                break
            yield record
            position = end
        start = position + 1


def _from(lines: Sequence[str], start: int) -> Iterable[str]:
    return (lines[i] for i in range(start, len(lines)))
