"""Values as users' files hold them: CSV has texts only, pandas makes 12.0 of 12, parquet has nulls.

Each function returns the value that is meant, or raises `ValueError` with what it must be; the same in every format.
What is missing (null, an empty cell, NaN) is `missing`; whether that is allowed is the caller's rule.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from decimal import Decimal
from typing import Any

import numpy as np

TRAIN_SPLITS = frozenset({"train", "training"})
HELDOUT_SPLITS = frozenset(
    "heldout held-out held_out test testing eval evaluation validation valid val dev development".split()
)


HIGHEST_COUNT = 10**9
"""Of tokens; above it a count is none."""
_DECIMAL_COMMA = re.compile(r"\s*0,\d+\s*|\s*\d+,(?:\d{1,2}|\d{4,})\s*")
"""Where the comma cannot group thousands; "1,234" may be either, and is no number."""


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, an empty or blank text, NaN."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, (float, np.floating)) and math.isnan(value)


def text(value: Any) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError("it must be text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"it is not valid Unicode at character {error.start}") from None
    return value


def words(value: Any) -> str:
    """A text; numbers, as columns of short replies are, become one."""
    if isinstance(value, (int, float, Decimal, np.number, np.bool_)) and not missing(value):
        return _answer(value.item() if isinstance(value, np.generic) else value)
    return text(value)


def name(value: Any, strip: bool = True) -> str:
    """A text that is not blank, without space around it; whole numbers, as ids often are, become one."""
    if type(value) is str and value.isascii():  # the usual case first: tables have millions of cells
        stripped = value.strip()
        if stripped:
            return stripped if strip else value
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)):
        return str(int(value))
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if not text(value).strip():
        raise ValueError("it must not be empty")
    return str(value).strip() if strip else str(value)


def count(value: Any) -> int:
    """A number of tokens; "12", 12.0 and "12.0" are 12."""
    if type(value) is int and 0 <= value <= HIGHEST_COUNT:
        return value
    try:
        found = number(value, HIGHEST_COUNT)
    except ValueError:
        found = math.nan
    if not found.is_integer():
        raise ValueError(f"it must be an integer from 0 to {HIGHEST_COUNT:,}")
    return int(found)


def number(value: Any, upper: float = math.inf, truth: bool = False) -> float:
    """A number from 0 to `upper`, also as text ("0,5" is 0.5); with `truth`, true and false are 1 and 0."""
    if type(value) is float and 0 <= value <= upper and value != math.inf:
        return value
    given = value.strip() if isinstance(value, str) else value
    if truth and isinstance(given, str) and given.lower() in ("true", "false"):
        given = given.lower() == "true"
    if isinstance(given, str) and _DECIMAL_COMMA.fullmatch(given):
        given = given.replace(",", ".")
    try:
        allowed = isinstance(given, (int, float, str, np.number, Decimal)) and not isinstance(given, (bool, np.bool_))
        found = float(given) if allowed or (truth and isinstance(given, (bool, np.bool_))) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and 0 <= found <= upper):
        raise ValueError(
            f"it must be a number from 0 to {upper:g}" if upper < math.inf else "it must be a number >= 0"
        )
    return found


def chance(value: Any) -> float:
    """A probability that is not 0."""
    if not (found := number(value, 1)):
        raise ValueError("it must be a number above 0, and at most 1")
    return found


def split(value: Any) -> str:
    """`train` or `heldout`, from the names that data sets give their parts: what is not trained on is held out."""
    given = value.strip().lower() if isinstance(value, str) else ""
    if given in TRAIN_SPLITS:
        return "train"
    if given in HELDOUT_SPLITS:
        return "heldout"
    raise ValueError("it must be train, or heldout (or test, validation, val, dev, eval)")


def answers(value: Any) -> tuple[str, ...]:
    """Accepted answers: a list of them, one alone, or a list as text (JSON, or as Python or numpy write it)."""
    if type(value) is list and all(type(one) is str and one.isascii() for one in value):
        return tuple(value)
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        value = _list(value.strip())
    if hasattr(value, "tolist"):  # a numpy array or scalar
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        there = [one for one in value if one is not None]  # beside an answer a null says nothing
        return tuple(_answer(one) for one in there or value)
    return () if missing(value) else (_answer(value),)


def _answer(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # pandas writes whole numbers so where some are missing
    if isinstance(value, (bool, int, float, Decimal)) and not missing(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("it must be a text or a list of texts")
    return text(value)


def _list(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        texts, commas = _texts_in(value)
        if len(texts) > 1 and not commas:  # numpy's "['one' 'two']", which Python reads as one text
            return texts
        if commas >= len(texts) - 1:
            return ast.literal_eval(value)  # literals only
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        pass
    raise ValueError('it looks like a list and is none; write it as JSON: ["one", "two"]')


def _texts_in(value: str) -> tuple[list[Any], int]:
    """The texts in quotes of what looks like a list, and the number of commas between them."""
    tokens = list(tokenize.generate_tokens(io.StringIO(value).readline))
    texts = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    return texts, sum(token.string == "," for token in tokens)
