"""Rows as they come out of a file, before anybody looks at their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


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
