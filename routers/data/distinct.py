"""The distinct cells of a column: what a table holds many times is read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SEPARATOR = "\x1f"


def distinct(column: Any) -> tuple[np.ndarray, list[Any]]:
    """The distinct cells of a column: ``[rows]`` places in a list of them, and that list."""
    if isinstance(column, pa.Array) and (keys := _keys(column)) is not None:
        codes = keys.dictionary_encode(null_encoding="encode").indices.to_numpy()
        return codes, column.take(pa.array(first_of(codes, int(codes.max(initial=-1)) + 1))).to_pylist()
    cells = column.to_pylist() if isinstance(column, pa.Array) else column
    seen: dict[Any, int] = {}
    found = [seen.setdefault(one if type(one) is str else (type(one), _shape(one)), len(seen)) for one in cells]
    codes = np.array(found, dtype=np.int32)
    return codes, [cells[i] for i in first_of(codes, len(seen))]


def _shape(cell: Any) -> str:
    return repr(cell.tolist() if hasattr(cell, "tolist") else cell)  # numpy shortens long arrays


def _keys(column: pa.Array) -> pa.Array | None:
    """What is equal where the cells are, and can be told apart by arrow; None: nothing of the kind."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return column.dictionary_decode()
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_string(kind.value_type):
        texts = column.flatten()
        if texts.null_count or pc.any(pc.match_substring(texts, _SEPARATOR)).as_py():
            return None
        lengths = pc.list_value_length(column).cast(pa.string())  # [] is not [""]
        return pc.binary_join_element_wise(lengths, pc.binary_join(column, _SEPARATOR), _SEPARATOR)
    return None if pa.types.is_nested(kind) else column


def first_of(codes: np.ndarray, count: int) -> np.ndarray:
    """Where each code stands first; -1: nowhere."""
    first = np.full(count, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return first
