"""Words that every package of this distribution shares. Frozen data and names, no logic.

Columns
    The world (a pool, an environment) answers a batch of completions with *columns*: one list per name, one value per
    completion. Every column is handed to the reward functions by keyword and written to the completions table. The
    trainer itself reads only the names below.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROUTE = "route"
"""Member that the completion chose; None where it holds no valid action."""
COST = "cost"
"""What the chosen member's reply cost, in USD."""
CORRECT = "correct"
"""Quality of the final answer in [0, 1]; None where it could not be graded."""
FEEDBACK = "feedback"
"""What went wrong, in words, for the self-teacher; "" where there is nothing to say."""

Row = Mapping[str, Any]
"""One dataset row: a `prompt` (string or chat messages) and whatever else the world needs to find the query again."""

Columns = dict[str, list[Any]]

World = Callable[[Sequence[Row], Sequence[str]], Columns]
"""(rows, completion texts) -> columns, each as long as the batch."""
