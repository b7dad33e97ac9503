"""Rows out of JSON: lines, lists, columns, and the other shapes that pandas and public data sets write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from routers.data.raw_rows import BadRow, Row


def json_lines(path: Path, text: str) -> Iterator[Row]:
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


def json_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of rows, also as the one list in a mapping (``{"version": ..., "data": rows}``); columns; what pandas
    writes by any ``orient``; or JSON lines under another name."""
    try:
        found = _loads(text)
    except (ValueError, RecursionError) as error:
        lines = list(json_lines(path, text))
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
