"""Checks shared by the reward functions: a bad value stops the run and names its row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def numbers(name: str, values: Sequence[Any], rows: int, low: float, high: float, **columns: Any) -> list[float]:
    """``values`` as floats in [low, high], one per row.

    Args:
        name: of the column, for messages.
        rows: how many there are.
        columns: others of the rows; ``query_id`` is named in messages.

    Raises:
        ValueError: wrong length, or a value that is missing, not a number, not finite or out of range. The message
            names the row (from 0) and, when the column is there, its query_id.
    """
    check_length(name, values, rows)
    for i, value in enumerate(values):
        is_number = isinstance(value, (int, float)) or hasattr(value, "__float__")
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(
                f"{where(i, **columns)}: {name} is {value!r}; it must be a number from {low:g} to {high:g}"
            )
    return [float(value) for value in values]


def texts(name: str, values: Sequence[Any], rows: int, **columns: Any) -> list[str]:
    """``values``, one text per row.

    Raises:
        ValueError: wrong length, or a value that is no text; the message names the row.
    """
    check_length(name, values, rows)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{where(i, **columns)}: {name} is {value!r}; it must be a text")
    return list(values)


def check_length(name: str, values: Sequence[Any], rows: int) -> None:
    if len(values) != rows:
        raise ValueError(f"column {name!r} has {len(values)} values for {rows} completions")


def where(i: int, query_id: Sequence[str] | None = None, **_: Any) -> str:
    """How messages name row ``i``."""
    return f"row {i}" if query_id is None else f"row {i} (query_id {query_id[i]!r})"
