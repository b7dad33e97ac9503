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
        outcomes = [self._play(row, text) for row, text in zip(rows, completions, strict=True)]
        names = ("route", "cost", "correct", "reply", "feedback", "format_error")
        return {name: [outcome[name] for outcome in outcomes] for name in names}

    def _play(self, row: Mapping[str, Any], text: str) -> dict[str, Any]:
        action = parse(text, self.table.members, self.grammar)
        # Also for invalid actions, so that a row of the wrong table never passes for a bad policy.
        recorded = self.table.lookup(row["query_id"], action.member or self.table.members[0])
        if action.member is None:
            outcome: dict[str, Any] = {"cost": 0.0, "correct": 0.0, "reply": ""}
        else:
            outcome = {"cost": recorded.cost, "correct": recorded.correct, "reply": recorded.reply}
        feedback = feedback_text(action, outcome["correct"])
        return {"route": action.member, **outcome, "feedback": feedback, "format_error": action.error}


def feedback_text(action: Action, correct: float) -> str:
    """Why a turn was not right, in words; "" when it was. Never holds the reply or the gold answer."""
    if action.member is None:
        return action.error
    if correct >= 1.0:
        return ""
    verdict = "wrong" if correct <= 0.0 else "only partly right"
    return f"The route to {action.member} gave {'a' if correct <= 0.0 else 'an'} {verdict} answer."
