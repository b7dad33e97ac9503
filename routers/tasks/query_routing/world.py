"""What happens after the policy's turn: the action is read, the member's reply is looked up, judged and priced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from routers.data.table import ReplyTable
from routers.language.grammar import Action, Grammar, parse


class RecordedWorld:
    """A world of recorded replies, callable as the trainer's ``world(rows, completions)``.

    It holds no state: the same rows and completions always give the same columns, in any order.

    Args:
        table: the recorded replies.
        grammar: the tags of the action; ``None`` is the default grammar.
    """

    def __init__(self, table: ReplyTable, grammar: Grammar | None = None) -> None:
        self.table = table
        self.grammar = grammar or Grammar()

    def __call__(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> dict[str, list[Any]]:
        """Play one turn per row.

        Args:
            rows: dataset rows with ``query_id``.
            completions: the policy's text per row, special tokens removed.

        Returns:
            Columns with one value per row. ``route``: member or None; ``cost``: USD of the reply; ``correct``: 0 to 1;
            ``reply``: the member's text; ``feedback``: why it was not right, in words ("" when it was);
            ``format_error``: "" or what is wrong with the action. An invalid action asks nobody: cost 0, correct 0.

        Raises:
            ValueError: as many rows as completions are needed.
            KeyError: a ``query_id`` that the table does not hold.
        """
        if len(rows) != len(completions):
            raise ValueError(f"{len(rows)} rows but {len(completions)} completions")
        actions = [parse(text, self.table.members, self.grammar) for text in completions]
        # Also for invalid actions, so that a row of the wrong table never passes for a bad policy.
        # Of a turn that asks nobody, too: a query that the table does not know is an error.
        asked = [action.member or self.table.members[0] for action in actions]
        recorded = [self.table.lookup(row["query_id"], member) for row, member in zip(rows, asked, strict=True)]
        replies = [None if a.member is None else r for a, r in zip(actions, recorded, strict=True)]
        correct = [r.correct if r else 0.0 for r in replies]
        return {
            "route": [action.member for action in actions],
            "cost": [r.cost if r else 0.0 for r in replies],
            "correct": correct,
            "reply": [r.reply if r else "" for r in replies],
            "feedback": [feedback_text(action, right) for action, right in zip(actions, correct, strict=True)],
            "format_error": [action.error for action in actions],
        }


def feedback_text(action: Action, correct: float) -> str:
    """Why a turn was not right, in words; "" when it was. Never holds the reply or the gold answer."""
    if action.member is None:
        return action.error
    if correct >= 1.0:
        return ""
    verdict = "wrong" if correct <= 0.0 else "only partly right"
    return f"The route to {action.member} gave {'a' if correct <= 0.0 else 'an'} {verdict} answer."
