"""Numbers as objects: order, sequences, bases, divisibility."""

from __future__ import annotations

import math
import random

Drawn = tuple[str, list[str], tuple[object, ...]]


def draw(rng: random.Random) -> Drawn:
    """Easy: larger of two, next of a short count, even or odd. Hard: bases, primes, gcd, digit sums, sorting."""
    kind = rng.choice("larger next next parity binary decimal hex prime gcd digits sort max square geometric".split())
    a, b = rng.randint(2, 99), rng.randint(2, 999)
    some = rng.sample(range(2, 999), rng.randint(4, 6))
    listed = ", ".join(map(str, some))
    if kind == "larger":
        a, b = rng.sample(range(2, 5000), 2)
        word, value = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
        return f"Which number is {word}, {a} or {b}?", [str(value)], (kind, a, b)
    if kind == "next":
        step = rng.choice((1, 2, 2, 5, 10, rng.randint(3, 37), -rng.randint(2, 9)))
        start = rng.choice((rng.randint(1, 9), rng.randint(50, 300)))
        shown = ", ".join(str(start + i * step) for i in range(4))
        text = rng.choice((f"What comes next: {shown}?", f"Continue the sequence: {shown}, ..."))
        return text, [str(start + 4 * step)], (kind, start, step)
    if kind == "geometric":
        start, ratio = rng.randint(1, 7), rng.randint(2, 5)
        shown = ", ".join(str(start * ratio**i) for i in range(4))
        return f"What comes next: {shown}?", [str(start * ratio**4)], (kind, start, ratio)
    if kind == "parity":
        return f"Is {b} even or odd?", ["odd" if b % 2 else "even"], (kind, b)
    if kind == "binary":
        text = rng.choice((f"Write {a} in binary.", f"What is {a} in base 2?", f"Convert {a} to binary."))
        return text, [f"{a:b}"], (kind, a)
    if kind == "decimal":
        text = rng.choice((f"What is binary {a:b} in decimal?", f"Convert {a:b} from base 2 to base 10."))
        return text, [str(a)], (kind, a)
    if kind == "hex":
        number = rng.randint(20, 999)
        return f"Write {number} in hexadecimal.", [f"{number:x}", f"0x{number:x}"], (kind, number)
    if kind == "prime":
        prime = b > 1 and all(b % d for d in range(2, math.isqrt(b) + 1))
        return f"Is {b} a prime number? Answer yes or no.", ["yes" if prime else "no"], (kind, b)
    if kind == "gcd":
        g = rng.randint(2, 24)
        x, y = g * rng.randint(2, 15), g * rng.randint(2, 15)
        text = rng.choice((f"What is the greatest common divisor of {x} and {y}?", f"Find the gcd of {x} and {y}."))
        return text, [str(math.gcd(x, y))], (kind, *sorted((x, y)))
    if kind == "digits":
        number = rng.randint(100, 9_999_999)
        text = rng.choice((f"What is the sum of the digits of {number}?", f"Add up the digits of {number}."))
        return text, [str(sum(map(int, str(number))))], (kind, number)
    if kind == "sort":
        return f"Sort from smallest to largest: {listed}", [", ".join(map(str, sorted(some)))], (kind, *sorted(some))
    if kind == "max":
        word, value = rng.choice((("largest", max(some)), ("smallest", min(some))))
        return f"Which is the {word} number: {listed}?", [str(value)], (kind, *sorted(some))
    number = rng.choice((rng.randint(2, 12), rng.randint(13, 99)))
    return f"What is the square of {number}?", [str(number**2)], (kind, number)
