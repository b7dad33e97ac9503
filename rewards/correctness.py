"""The answer reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.columns import numbers


def correctness_reward(completions: Sequence[Any], correct: Sequence[float], **columns: Any) -> list[float]:
    """How right the reply was: the column ``correct``, 0 to 1.

    Raises:
        ValueError: names the row whose value is missing, not finite or out of range.
    """
    return numbers("correct", correct, len(completions), 0.0, 1.0, **columns)
