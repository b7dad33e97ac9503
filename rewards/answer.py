"""The answer rewards of agents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rewards.columns import numbers, texts

AnswerColumn = Literal["correct", "em", "f1"]


def make_answer_reward(column: AnswerColumn = "correct", *, needs_format: bool = False) -> Callable[..., list[float]]:
    """A reward function ``answer_reward``: what the final answer earned, 0 to 1, by a column of the environment.

    Args:
        column: "correct" is the score by the row's own metric, in which lists of candidates do not pay; "em" and "f1"
            are the standard scores (plain F1 does pay for such lists: better for reports than for training).
        needs_format: 0 where there was a format error, as in Router-R1: a right answer does not make up for it.

    Raises:
        ValueError: when called, names the row whose value is missing, not finite or out of range.
    """

    def answer_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        rows = len(completions)
        scores = numbers(column, columns.pop(column), rows, 0.0, 1.0, **columns)
        if not needs_format:
            return scores
        errors = texts("format_error", columns.pop("format_error"), rows, **columns)
        return [0.0 if error else value for value, error in zip(scores, errors, strict=True)]

    return answer_reward
