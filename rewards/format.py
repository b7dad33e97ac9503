"""The format rewards: decided from what the environment says of the parsed turns, never by parsing text again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rewards.columns import check_length, numbers, texts


def format_reward(completions: Sequence[Any], format_error: Sequence[str], **columns: Any) -> list[float]:
    """0 for a completion without a format error and -1 with one: a penalty, so that a valid form alone earns nothing.

    This is Router-R1's format reward (three named levels there, all -1).

    Args:
        completions: as given by TRL; only their number is used.
        format_error: "" or what is wrong, from the world.

    Raises:
        ValueError: names the row whose value is not a text.
    """
    return [-1.0 if error else 0.0 for error in texts("format_error", format_error, len(completions), **columns)]


def make_invalid_action_reward(penalty: float = 0.25) -> Callable[..., list[float]]:
    """A softer format reward for several turns, ``invalid_action_reward``: an agent that recovers keeps a part.

    ``-min(1, penalty * invalid_actions)``, and -1 for a completion that never gave a valid answer though something was
    wrong with its form.

    Args:
        penalty: of one invalid turn, 0 to 1.

    Raises:
        ValueError: a penalty outside [0, 1]; and, when called, names the row of a bad column.
    """
    if not 0 <= penalty <= 1:
        raise ValueError(f"the penalty of an invalid turn is {penalty!r}; it must lie in [0, 1]")

    def invalid_action_reward(
        completions: Sequence[Any],
        invalid_actions: Sequence[int],
        answer: Sequence[str | None],
        format_error: Sequence[str],
        **columns: Any,
    ) -> list[float]:
        rows = len(completions)
        check_length("answer", answer, rows)
        counts = numbers("invalid_actions", invalid_actions, rows, 0, math.inf, **columns)
        errors = texts("format_error", format_error, rows, **columns)
        return [
            -1.0 if text is None and error else -min(1.0, penalty * count)
            for count, text, error in zip(counts, answer, errors, strict=True)
        ]

    return invalid_action_reward
