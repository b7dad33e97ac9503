"""Rows out of users' files: the one reader of parquet, JSON and separated text, plain or compressed.

A row that cannot be read is returned as a `BadRow` with its reason, so that the caller can leave it out and name it
(`srpo.quarantine`). What is wrong with a whole file is one error that names it.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
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
_PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}
_OTHER_FILES = tuple(".txt .arrow .feather .xls .xlsx .zip .zst .yaml .yml .pkl .sqlite .db".split())
_SEPARATORS = (",", ";", "\t", "|")
ROWS_AT_ONCE = 1 << 17
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


@dataclass
class Chunk:
    """Rows of a table, by column: what is read a hundred thousand rows at a time."""

    numbers: Sequence[int]
    """Of the rows, as in `Row`."""
    columns: dict[str, Any]
    """Arrow arrays, or lists of cells in which None also stands for a cell that a row lacks."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """The same by row, where they were read so."""
    bad: Sequence[Row] = ()
    """Rows between them that are none."""

    def row(self, i: int) -> Mapping[str, Any]:
        """The cells of a row."""
        if self.rows is not None:
            return self.rows[i]
        cells = {name: column[i] for name, column in self.columns.items()}
        return {name: cell.as_py() if hasattr(cell, "as_py") else cell for name, cell in cells.items()}


def chunks_of(rows: Iterable[Row]) -> Iterator[Chunk]:
    """Rows, many at a time."""
    rest = iter(rows)
    while some := list(itertools.islice(rest, ROWS_AT_ONCE)):
        good = [row for row in some if isinstance(row.value, Mapping)]
        names = dict.fromkeys(name for shape in dict.fromkeys(tuple(row.value) for row in good) for name in shape)
        columns: dict[str, Any] = {name: [row.value.get(name) for row in good] for name in names}
        bad = [row for row in some if not isinstance(row.value, Mapping)]
        yield Chunk([row.number for row in good], columns, [row.value for row in good], bad)


def read_chunks(*paths: str | Path) -> Iterator[Chunk]:
    """The rows of files and folders, as one table; parquet, which stores columns, is not taken apart into rows.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    files, count = [file for path in paths for file in files_of(path)], 0
    for file in files:
        if format_of(file) == ".parquet":
            chunks = _parquet_chunks(file, count)
        elif len(files) > 1:
            chunks = chunks_of(Row(number, row.value) for number, row in enumerate(rows_of(file), start=count + 1))
        else:
            chunks = chunks_of(rows_of(file))
        for chunk in chunks:
            count += len(chunk.numbers) + len(chunk.bad)
            yield chunk


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, or of the files in a folder; a row that cannot be read has a `BadRow` for its value.

    Blank lines and rows without any value are skipped. Text is UTF-8 (or UTF-16 or -32 with its mark); the
    separator of .csv and .tsv is found in the header. What a cell holds under no name is a column without a name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file as a whole cannot be read; the message names it.
    """
    files = files_of(path)
    if files == [Path(path).expanduser()]:
        return list(rows_of(files[0]))
    return [Row(number, row.value) for number, row in enumerate((row for f in files for row in rows_of(f)), start=1)]


def files_of(path: str | Path) -> list[Path]:
    """A file, or the tables in a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or none of a known format.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and format_of(file)]
        if not files:
            raise ValueError(f"{path}: this folder holds no {', '.join(FORMATS)} file")
        return files
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if format_of(path) is None:
        packed = " or ".join(_PACKED)
        raise ValueError(f"{path}: its name says no format; there are {', '.join(FORMATS)}, packed as {packed} or not")
    return [path]


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of one file, one after the other; parquet is never in memory as a whole."""
    kind = format_of(path)
    if kind == ".parquet":
        for chunk in _parquet_chunks(path, 0):
            cells = zip(*(column.to_pylist() for column in chunk.columns.values()), strict=True)
            for number, values in zip(chunk.numbers, cells, strict=True):
                yield Row(number, dict(zip(chunk.columns, values, strict=True)))
        return
    text, broken = _decoded(path, _unpacked(path))
    reader = {".jsonl": _json_lines, ".json": _json_rows}.get(kind or "", _separated)
    rows_read = reader(path, text)
    yield from rows_read if broken is None else (_checked_bytes(row, broken) for row in rows_read)


def _unpacked(path: Path) -> bytes:
    unpack, data = _PACKED.get(path.suffix.lower()), path.read_bytes()
    try:
        return data if unpack is None else unpack(data)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path}: is not a whole {path.suffix.lower()} file ({error})") from None


def _parquet_chunks(path: Path, count: int) -> Iterator[Chunk]:
    import pyarrow as pa  # here, because reading rows from memory should not need arrow
    import pyarrow.parquet as pq

    packed = path.suffix.lower() in _PACKED
    source = pa.BufferReader(_unpacked(path)) if packed else path
    try:
        with pq.ParquetFile(source, memory_map=not packed) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                batch.validate(full=True)  # texts that are no UTF-8
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                yield Chunk(range(count + 1, count + batch.num_rows + 1), columns)
                count += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None


_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _decoded(path: Path, data: bytes) -> tuple[str, str | None]:
    """The text of a file; and, where bytes are no UTF-8, words that name the first, for the rows that hold one."""
    if encoding := next((_WIDE_MARKS[mark] for mark in _WIDE_MARKS if data.startswith(mark)), None):
        try:
            return data.decode(encoding, "surrogatepass"), None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: begins as {encoding} and is none at byte {error.start}; save it as UTF-8"
            ) from None
    while data.startswith(codecs.BOM_UTF8):  # some tools put theirs before another's
        data = data[len(codecs.BOM_UTF8) :]
    if b"\0" in data[:2000].partition(b"\n")[0]:
        raise ValueError(f"{path}: its first line holds NUL bytes, as UTF-16 without its mark does; save it as UTF-8")
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
    """One row a line; or one list of rows, which some write under this name."""
    if text.lstrip()[:1] == "[":
        try:
            found = _loads(text)
        except (ValueError, RecursionError):
            pass  # lines that are lists, or a list that is broken: each line says what it is
        else:
            yield from _numbered(found)
            return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(), which also cuts at U+2028
        if line.strip():
            try:
                yield Row(number, _loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(number, BadRow("not JSON", f"is not JSON: {error}", line))


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of rows, also as the one list in a mapping (``{"version": ..., "data": rows}``); columns; what pandas
    writes by any ``orient``; or JSON lines under another name."""
    try:
        found = _loads(text)
    except (ValueError, RecursionError) as error:
        lines = list(_json_lines(path, text))
        if text.lstrip()[:1] == "[" or not any(isinstance(row.value, dict) for row in lines):
            raise ValueError(f"{path}: is not JSON: {error}") from None
        yield from lines
        return
    if isinstance(found, dict):
        found = _in_mapping(path, found)
    yield from _numbered(found if isinstance(found, list) else [found])


def _numbered(rows: list[Any]) -> Iterator[Row]:
    return (Row(number, value) for number, value in enumerate(rows, start=1))


def _in_mapping(path: Path, found: dict[str, Any]) -> Any:
    lists = [value for value in found.values() if isinstance(value, list)]
    rows = [value for value in lists if value and all(isinstance(row, dict) for row in value)]
    if found.keys() == {"columns", "index", "data"} and len(lists) == 3:  # pandas' "split"
        return [_split_row(found["columns"], row) for row in found["data"]]
    if len(rows) == 1 and len(lists) == 1:
        return rows[0]
    if len(found) == 1 and lists:
        return lists[0]
    if found and len(lists) == len(found):
        return _from_columns(path, found)
    inner = [value for value in found.values() if isinstance(value, dict)]
    if inner and len(inner) == len(found) and all(value.keys() == inner[0].keys() for value in inner):
        if inner[0] and all(name.isdecimal() for name in inner[0]):  # pandas' "columns", its default
            return [{column: cells[index] for column, cells in found.items()} for index in inner[0]]
        if all(name.isdecimal() for name in found):  # pandas' "index"
            return inner
    return found


def _split_row(columns: list[Any], row: Any) -> Any:
    if isinstance(row, list) and len(row) == len(columns):
        return {str(name): value for name, value in zip(columns, row, strict=True)}
    return BadRow("wrong number of cells", f"is no list of {len(columns)} values, as the columns are", repr(row))


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
    spaced = re.fullmatch(
        rf"[^{re.escape(separator)}]+(?:{re.escape(separator)} [^{re.escape(separator)}]+)+", lines[0]
    )
    records = _records(lines, separator, spaced is not None)  # "a, b, c": the space belongs to the separator
    first = next(records)
    if isinstance(first, BadRow):
        raise ValueError(f"{path}: the header {first.detail}")
    header = [name.strip() for name in first]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} stands twice in its first line, the header; rename one")
    number = 0
    for record in records:
        if isinstance(record, BadRow):
            number += 1
            yield Row(number, record)
        elif any(cell.strip() for cell in record):
            number += 1
            while len(record) > len(header) and not record[-1].strip():  # spreadsheets write empty cells behind rows
                record.pop()
            if len(record) == len(header):
                named = zip(header, record, strict=True)
                yield Row(number, {name: cell for name, cell in named if name or cell.strip()})
            else:
                detail = f"has {len(record)} cells, the header has {len(header)}"
                yield Row(number, BadRow("wrong number of cells", detail, separator.join(record)))


def _separator(header: str, usual: str) -> str:
    def cells(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator), []))

    return max((usual, *_SEPARATORS), key=cells)  # the first of equals


def _records(lines: Sequence[str], separator: str, spaced: bool) -> Iterator[list[str] | BadRow]:
    """Records, of one line or, in quotes, of several. Where quotes do not close, only that line is bad."""
    start, width = 0, None
    while start < len(lines):
        options: Any = {"delimiter": separator, "skipinitialspace": spaced, "strict": True}
        reader, position = csv.reader(_from(lines, start), **options), start
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
