"""The range of every number that a user may set, declared beside its field and checked in one place.

    @dataclass
    class Settings:
        RANGES: ClassVar[Ranges] = {"rate": between(0, 1), "limit": at_least(1)}
        rate: float = 0.5
        limit: int | None = None

        def __post_init__(self) -> None:
            check_numbers(self)

NaN and the infinities are out of every range that does not name them, also inside lists and mappings; a bool or a
text is no number. A numeric field without a range is found by tests/recipes/test_ranges.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


class OutOfRange(ValueError):
    """A number that cannot be meant: the message names the field, the value, and what is allowed."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, without an end that is `open`; or one of the numbers `also`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: Any) -> bool:
        if value in self.also:
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low, high = f"{self.low:.12g}", f"{self.high:.12g}"
        if math.isinf(self.low) and math.isinf(self.high):
            text = "a finite number"
        elif math.isinf(self.high):
            text = f"above {low}" if self.open_low else f"at least {low}"
        else:
            text = f"in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"
        return " or ".join([text, *(f".{v:g}" if math.isinf(v) else f"{v:g}" for v in self.also)])


Ranges = Mapping[str, Range]
"""Field -> its range; of a field that holds several numbers, the range of each."""


def at_least(low: float, *also: float) -> Range:
    return Range(low, also=also)


def above(low: float, *also: float) -> Range:
    return Range(low, open_low=True, also=also)


def between(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Range:
    return Range(low, high, open_low, open_high)


FINITE = Range()
SEED = between(0, 2**32 - 1)
"""What numpy takes as a seed."""


@dataclass(frozen=True)
class Number:
    """What a field's annotation says about the numbers that it holds."""

    whole: bool
    several: bool
    optional: bool
    text: bool
    """Words are allowed beside numbers; whoever reads the field knows which."""


@functools.cache
def numeric_fields(cls: type) -> Mapping[str, Number]:
    """The fields of a dataclass that hold a number, or a list or tuple of numbers."""
    hints = get_type_hints(cls)
    found = {field.name: _number(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: number for name, number in found.items() if number is not None}


def check_numbers(settings: Any) -> None:
    """Raise for a number of a dataclass that lies outside `RANGES` of its class, and for NaN or infinity in any field.

    Raises:
        OutOfRange: names field, value and range.
    """
    kind: Any = type(settings)
    known, ranges = numeric_fields(kind), kind.RANGES
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)
        if field.name in known:
            _check_field(field.name, value, known[field.name], ranges.get(field.name, FINITE))
        elif (odd := next(_not_finite(value), None)) is not None:
            raise OutOfRange(field.name, f"{field.name} holds {odd}: every number must be finite")


def check_number(name: str, value: Any, allowed: Range, whole: bool = False) -> None:
    """Raise OutOfRange unless `value` is a number in the range; `whole`: an integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise OutOfRange(name, f"{name}={value!r}: must be a {'whole ' if whole else ''}number, {allowed}")
    if value not in allowed:
        raise OutOfRange(name, f"{name}={value!r}: must be {allowed}")


def ranged(allowed: Range, whole: bool = False) -> Callable[[str], Any]:
    """`type=` of an argparse option: a number of this range."""

    def parse(text: str) -> Any:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if whole else 'a number'}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {allowed}")
        return value

    return parse


def _check_field(name: str, value: Any, number: Number, allowed: Range) -> None:
    if (value is None and number.optional) or (isinstance(value, str) and number.text):
        return
    if not number.several:
        return check_number(name, value, allowed, number.whole)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise OutOfRange(name, f"{name}={value!r}: must be a list of numbers, each {allowed}")
    for i, one in enumerate(value):
        try:
            check_number(f"{name}[{i}]", one, allowed, number.whole)
        except OutOfRange as error:
            raise OutOfRange(name, str(error)) from None


def _number(hint: Any) -> Number | None:
    origin, args = get_origin(hint), get_args(hint)
    if hint in (int, float):
        return Number(hint is int, several=False, optional=False, text=False)
    if origin in (Union, types.UnionType):
        parts = [part for part in map(_number, args) if part is not None]
        if not parts or dict in args or any(get_origin(arg) is dict for arg in args):
            return None
        return Number(
            all(part.whole for part in parts),
            any(part.several for part in parts),
            optional=type(None) in args,
            text=str in args,
        )
    if origin in (list, tuple) and args:
        part = _number(args[0])
        return None if part is None else dataclasses.replace(part, several=True)
    return None


def _not_finite(value: Any) -> Iterator[float]:
    if isinstance(value, float) and not math.isfinite(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _not_finite(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _not_finite(item)
