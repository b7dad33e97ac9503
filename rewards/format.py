"""The format reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.columns import where


def format_reward(completions: Sequence[Any], format_error: Sequence[str], **columns: Any) -> list[float]:
    """0 for a valid action and -1 for an invalid one: a penalty, so that a valid action alone earns nothing.

    Args:
        completions: as given by TRL; only their number is used.
        format_error: "" or what is wrong, from the world. The text is never parsed again here.

    Raises:
        ValueError: names the row whose value is not a text.
    """
    if len(format_error) != len(completions):
        raise ValueError(f"column 'format_error' has {len(format_error)} values for {len(completions)} completions")
    for i, error in enumerate(format_error):
        if not isinstance(error, str):
            raise ValueError(f"{where(i, **columns)}: format_error is {error!r}; it must be a text")
    return [-1.0 if error else 0.0 for error in format_error]
