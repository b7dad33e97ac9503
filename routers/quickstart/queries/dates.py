"""Weekdays, date arithmetic and the calendar."""

from __future__ import annotations

import calendar
import random
from datetime import date, timedelta

Drawn = tuple[str, list[str], tuple[object, ...]]
_DAYS = list(calendar.day_name)
_MONTHS = list(calendar.month_name)[1:]


def draw(rng: random.Random) -> Drawn:
    """Easy: the order of weekdays and months. Hard: weekdays of dates, adding days, days between dates."""
    kind = rng.choice(
        ("next", "next", "month", "monthdays", "weekday", "weekday", "add", "before", "between", "after")
    )
    first = date(1990, 1, 1) + timedelta(days=rng.randrange(15000))
    n = rng.randint(3, 400)
    spoken = f"{_MONTHS[first.month - 1]} {first.day}, {first.year}"
    shown = rng.choice((first.isoformat(), spoken))
    if kind == "next":
        i, (word, step) = rng.randrange(7), rng.choice((("after", 1), ("before", -1)))
        text = rng.choice((f"Which day comes {word} {_DAYS[i]}?", f"What day is right {word} {_DAYS[i]}?"))
        return text, [_DAYS[(i + step) % 7]], ("next", i, step)
    if kind == "month":
        i, (word, step) = rng.randrange(12), rng.choice((("after", 1), ("before", -1)))
        return f"Which month comes {word} {_MONTHS[i]}?", [_MONTHS[(i + step) % 12]], ("month", i, step)
    if kind == "monthdays":
        i, year = rng.randrange(12), rng.randint(1990, 2031)
        days = str(calendar.monthrange(year, i + 1)[1])
        return f"How many days does {_MONTHS[i]} {year} have?", [days], ("monthdays", i, days)
    if kind == "weekday":
        templates = ("What day of the week is {}?", "Which weekday was {}?", "On which day of the week does {} fall?")
        return rng.choice(templates).format(shown), [_DAYS[first.weekday()]], ("weekday", first)
    if kind == "add":
        text = rng.choice((f"What date is {n} days after {shown}?", f"Add {n} days to {shown}. What is the date?"))
        return f"{text} (YYYY-MM-DD)", [(first + timedelta(days=n)).isoformat()], ("add", first, n)
    if kind == "before":
        text = f"What date is {n} days before {shown}? (YYYY-MM-DD)"
        return text, [(first - timedelta(days=n)).isoformat()], ("add", first, -n)
    if kind == "between":
        second = (first + timedelta(days=n)).isoformat()
        text = f"How many days are between {first.isoformat()} and {second}?"
        return text, [str(n)], ("between", first, n)
    i = rng.randrange(7)
    return f"Today is {_DAYS[i]}. What day is it in {n} days?", [_DAYS[(i + n) % 7]], ("after", i, n)
