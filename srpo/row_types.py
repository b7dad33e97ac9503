"""Rows read from a file whose values cannot stand in one table: a dataset's column has one type."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_EXCERPT = 200


def odd_types(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, str]]:
    """Rows that cannot stand in one dataset with the others: index -> (column, why)."""
    odd: dict[int, tuple[str, str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = {i: row[name] for i, row in enumerate(rows) if row.get(name) is not None and i not in odd}
        odd |= {i: (name, f"{name} {why}") for i, why in _odd_values(values).items()}
    return dict(sorted(odd.items()))


def _odd_values(values: Mapping[int, Any]) -> dict[int, str]:
    if not values:
        return {}
    kinds = {i: _kind(value) for i, value in values.items()}
    usual = Counter(kinds.values()).most_common(1)[0][0]
    odd = {i: f"is a {kind}, in most rows a {usual}" for i, kind in kinds.items() if kind != usual}
    alike = {i: value for i, value in values.items() if i not in odd}
    if _problem(list(alike.values())) is None:
        return odd
    alone = {i: why for i, value in alike.items() if (why := _problem([value])) is not None}
    whole = {i: value for i, value in alike.items() if i not in alone}
    first = next(iter(whole.values()), None)
    beside = {i: why for i, value in whole.items() if (why := _problem([first, value])) is not None}
    return odd | {i: f"cannot be part of a dataset: {why}" for i, why in (alone | beside).items()}


def _kind(value: Any) -> str:
    """Types that one column may mix have one kind."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, Mapping):
        return "mapping"
    if isinstance(value, (list, tuple)):
        return "list"
    return type(value).__name__


def _problem(values: list[Any]) -> str | None:
    """Why no dataset can hold these values in one column; None: one can."""
    from datasets import Dataset  # here, because importing it takes a second

    try:
        Dataset.from_list([{"column": value} for value in values])
    except Exception as error:  # pyarrow raises a dozen kinds
        return f"{type(error).__name__}: {error}"[:_EXCERPT]
    return None


def shown(value: Any) -> str:
    """The beginning of a value as Python writes it, for a message or the quarantine."""
    try:
        return repr(value)[:_EXCERPT]
    except Exception:  # an int of 5,000 digits
        return f"<{type(value).__name__}>"
