"""Sums, word problems and unit conversions. Easy ones fit in a small model's head, hard ones need a tool."""

from __future__ import annotations

import random

Drawn = tuple[str, list[str], tuple[object, ...]]


def draw_sum(rng: random.Random) -> Drawn:
    """One to five operands; from single digits (easy) to products of three-digit numbers and brackets (hard)."""
    level = rng.choice(("tiny", "tiny", "easy", "add", "chain", "product", "bracket", "divide", "percent"))
    if level == "tiny":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        expression, value = rng.choice(((f"{a} + {b}", a + b), (f"{a + b} - {b}", a), (f"{a} * {b}", a * b)))
    elif level == "easy":
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        expression, value = rng.choice(((f"{a} + {b}", a + b), (f"{a} - {b}", a - b)))
    elif level == "add":
        a, b = rng.randint(1000, 99999), rng.randint(1000, 99999)
        expression, value = rng.choice(((f"{a} + {b}", a + b), (f"{a} - {b}", a - b)))
    elif level == "chain":
        terms = [rng.randint(10, 999) for _ in range(rng.randint(3, 5))]
        expression, value = " + ".join(map(str, terms)), sum(terms)
    elif level == "product":
        a, b = rng.randint(12, 999), rng.randint(12, 999)
        expression, value = f"{a} * {b}", a * b
    elif level == "bracket":
        a, b, c = rng.randint(11, 99), rng.randint(11, 99), rng.randint(3, 29)
        expression, value = f"({a} + {b}) * {c}", (a + b) * c
    elif level == "divide":
        b, value = rng.randint(6, 48), rng.randint(12, 240)
        expression = f"{b * value} / {b}"
    else:
        percent, base = rng.choice((5, 10, 15, 20, 25, 40, 75)), rng.randint(2, 60) * 20
        text = rng.choice((f"What is {percent}% of {base}?", f"Find {percent} percent of {base}."))
        return text, [str(percent * base // 100)], ("percent", percent, base)
    worded = expression
    if rng.random() < 0.35:
        for sign, word in ((" + ", " plus "), (" - ", " minus "), (" * ", " times "), (" / ", " divided by ")):
            worded = worded.replace(sign, word)
    template = rng.choice(("What is {}?", "Compute {}.", "How much is {}?", "Calculate {}", "Work out {}.", "{} = ?"))
    return template.format(worded), [str(value)], ("sum", *sorted(expression.split()))


_NAMES = "Ana Ben Chloe Dev Ella Finn Grace Hugo Iris Jack Kira Leo Mona Nils Olga Paul Rita Sam Tara Vera".split()
_THINGS = "apples books coins cards stamps pencils marbles shells stickers tickets eggs buttons".split()


def draw_word_problem(rng: random.Random) -> Drawn:
    """One to three operations told as a story; small numbers (easy) or larger ones (hard)."""
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    hard = rng.random() < 0.6
    a, b, c = (rng.randint(21, 480) for _ in range(3)) if hard else (rng.randint(2, 9) for _ in range(3))
    n = rng.randint(3, 9)
    each = rng.randint(12, 60) if hard else rng.randint(2, 6)
    stories = (
        (f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", a + b),
        (f"{name} had {a + b} {thing} and gave {b} to {other}. How many {thing} are left?", a),
        (f"A box holds {each} {thing}. How many {thing} are in {n} boxes?", each * n),
        (f"{name} shares {each * n} {thing} equally among {n} friends. How many does each friend get?", each),
        (
            f"{name} buys {n} {thing} at {each} dollars each and pays {b} dollars for a bag. What is the total?",
            n * each + b,
        ),
        (f"{name} has {a} {thing}, {other} has {b} more than {name}. How many do they have together?", a + a + b),
        (f"{name} reads {each} pages a day. How many pages are read in {n} days?", each * n),
        (f"A shop sold {a} {thing} on Monday, {b} on Tuesday and {c} on Friday. How many in all?", a + b + c),
        (f"{n} bags have {each} {thing} each. {name} takes {n} {thing} out. How many {thing} remain?", n * each - n),
        (f"A train goes {each} km per hour for {n} hours. How far does it travel in km?", each * n),
    )
    kind = rng.randrange(len(stories))
    text, value = stories[kind]
    return text, [str(value)], ("story", kind, text if value < 0 else value, a, b)


_UNITS = (
    # small unit, large unit, how many small ones make a large one
    ("minutes", "hours", 60),
    ("seconds", "minutes", 60),
    ("hours", "days", 24),
    ("days", "weeks", 7),
    ("months", "years", 12),
    ("inches", "feet", 12),
    ("feet", "yards", 3),
    ("feet", "miles", 5280),
    ("ounces", "pounds", 16),
    ("grams", "kilograms", 1000),
    ("meters", "kilometers", 1000),
    ("centimeters", "meters", 100),
    ("millimeters", "centimeters", 10),
    ("milliliters", "liters", 1000),
    ("cups", "gallons", 16),
    ("pints", "quarts", 2),
    ("seconds", "hours", 3600),
    ("minutes", "days", 1440),
    ("eggs", "dozens", 12),
)


def draw_unit(rng: random.Random) -> Drawn:
    """Whole-number conversions in both directions, 1 to 90 of the larger unit."""
    small, large, factor = rng.choice(_UNITS)
    count = rng.choice((1, 2, 3, 5, 10, rng.randint(4, 90), rng.randint(4, 90), rng.randint(4, 90)))
    if rng.random() < 0.6:
        templates = ("How many {s} are in {n} {l}?", "Convert {n} {l} to {s}.", "{n} {l} is how many {s}?")
        text = rng.choice(templates).format(s=small, l=large, n=count)
        value = count * factor
    else:
        templates = ("How many {l} are {n} {s}?", "Convert {n} {s} to {l}.", "{n} {s} is how many {l}?")
        text = rng.choice(templates).format(s=small, l=large, n=count * factor)
        value = count
    return text, [str(value)], ("unit", small, large, count)
