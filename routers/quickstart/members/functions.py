"""The functions that the ``python`` member may call. All are pure, total on their domain, and bounded."""

from __future__ import annotations

import calendar
import math
from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import pairwise
from typing import Any

_DAYS = list(calendar.day_name)
_MONTHS = list(calendar.month_name)[1:]
_MAX_INT = 10**12
# base unit and size in it
_UNITS: dict[str, tuple[str, float]] = {
    "second": ("second", 1),
    "minute": ("second", 60),
    "hour": ("second", 3600),
    "day": ("second", 86400),
    "week": ("second", 604800),
    "month": ("month", 1),
    "year": ("month", 12),
    "inch": ("inch", 1),
    "foot": ("inch", 12),
    "yard": ("inch", 36),
    "mile": ("inch", 63360),
    "ounce": ("ounce", 1),
    "pound": ("ounce", 16),
    "gram": ("gram", 1),
    "kilogram": ("gram", 1000),
    "millimeter": ("millimeter", 1),
    "centimeter": ("millimeter", 10),
    "meter": ("millimeter", 1000),
    "kilometer": ("millimeter", 1_000_000),
    "milliliter": ("milliliter", 1),
    "liter": ("milliliter", 1000),
    "cup": ("cup", 1),
    "pint": ("cup", 2),
    "quart": ("cup", 4),
    "gallon": ("cup", 16),
    "egg": ("egg", 1),
    "dozen": ("egg", 12),
}
_PLURALS = {"inches": "inch", "feet": "foot"}
UNIT_WORDS = (*_PLURALS, *(f"{name}s" for name in _UNITS if name not in _PLURALS.values()))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or abs(value) > _MAX_INT:
        raise ValueError(f"{value!r} is not a whole number up to {_MAX_INT:.0e}")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _date(value: Any) -> date:
    for form in ("%Y-%m-%d", "%B %d, %Y"):
        try:
            return datetime.strptime(_text(value), form).date()
        except ValueError:
            continue
    raise ValueError(f"{value!r} is not a date")


def _unit(name: Any) -> tuple[str, float]:
    singular = _PLURALS.get(_text(name), _text(name).removesuffix("s"))
    if singular not in _UNITS:
        raise ValueError(f"no unit {name!r}")
    return _UNITS[singular]


def convert(amount: str, new: str) -> float:
    """``amount``, such as "3 hours", in unit ``new``."""
    number, _, old = _text(amount).partition(" ")
    (old_base, old_size), (new_base, new_size) = _unit(old), _unit(new)
    if old_base != new_base:
        raise ValueError(f"{old} does not convert to {new}")
    return _integer(float(number)) * old_size / new_size


def add_days(day: str, count: int) -> str:
    return (_date(day) + timedelta(days=_integer(count))).isoformat()


def days_between(first: str, second: str) -> int:
    return abs((_date(second) - _date(first)).days)


def weekday(day: str) -> str:
    return _DAYS[_date(day).weekday()]


def shift_day(day: str, count: int) -> str:
    return _DAYS[(_DAYS.index(_text(day)) + _integer(count)) % 7]


def shift_month(month: str, count: int) -> str:
    return _MONTHS[(_MONTHS.index(_text(month)) + _integer(count)) % 12]


def month_days(month: str, year: int) -> int:
    return calendar.monthrange(_integer(year), _MONTHS.index(_text(month)) + 1)[1]


def letter(word: str, position: int) -> str:
    """Letter at a position from 1; negative positions count from the end."""
    index = _integer(position)
    return _text(word)[index - 1 if index > 0 else index]


def is_prime(number: int) -> bool:
    value = _integer(number)
    if value > 10**8:
        raise ValueError("too large")
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


def repeat(word: str, count: int) -> str:
    if not 0 <= _integer(count) <= 50:
        raise ValueError("repeat at most 50 times")
    return _text(word) * _integer(count)


def sort(items: list[Any]) -> list[Any]:
    return sorted(items)


def longest(items: list[str]) -> str:
    return max(items, key=len)


def next_number(items: list[int]) -> float:
    """The next term, of a constant difference or else a constant ratio."""
    if len(items) < 3:
        raise ValueError("needs three numbers")
    differences = {b - a for a, b in pairwise(items)}
    if len(differences) == 1:
        return float(items[-1] + differences.pop())
    if all(b * items[0] == a * items[1] for a, b in pairwise(items)):
        return items[-1] * items[1] / items[0]
    raise ValueError("no rule found")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add_days": add_days,
    "binary": lambda number: f"{_integer(number):b}",
    "contains": lambda word, part: _text(part) in _text(word),
    "convert": convert,
    "count": lambda word, part: _text(word).count(_text(part)),
    "day_after": lambda day: shift_day(day, 1),
    "day_before": lambda day: shift_day(day, -1),
    "days_before": lambda day, count: add_days(day, -_integer(count)),
    "days_between": days_between,
    "decimal": lambda digits: int(str(digits), 2),
    "digit_sum": lambda number: sum(int(digit) for digit in str(abs(_integer(number)))),
    "gcd": lambda first, second: math.gcd(_integer(first), _integer(second)),
    "hexadecimal": lambda number: f"{_integer(number):x}",
    "is_prime": is_prime,
    "join": lambda first, second: _text(first) + _text(second),
    "length": lambda word: len(_text(word)),
    "letter": letter,
    "longest": longest,
    "max": lambda *numbers: max(*numbers),
    "min": lambda *numbers: min(*numbers),
    "month_after": lambda month: shift_month(month, 1),
    "month_before": lambda month: shift_month(month, -1),
    "month_days": month_days,
    "next_number": next_number,
    "parity": lambda number: "odd" if _integer(number) % 2 else "even",
    "repeat": repeat,
    "reverse": lambda word: _text(word)[::-1],
    "shift_day": shift_day,
    "sort": sort,
    "vowels": lambda word: sum(character in "aeiou" for character in _text(word)),
    "weekday": weekday,
}
