"""A table of recorded replies as a pool: nothing is called, every run is the same, costs come from the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from routers.data.table import ReplyTable, normalise_query
from routers.pool.ledger import Ledger
from routers.pool.pool import Pool
from routers.pool.protocol import BAD_REQUEST, Attempt
from routers.pool.reasoning import split_reasoning
from srpo.types import Usage

By = Literal["row", "query"]


class RecordedMember:
    """One member's column of a table.

    Args:
        table: the recorded replies.
        member: its name.
        by: "row": the reply to the dataset row's question, whatever the policy asks on the way, so that no
            sub-question can fall out of the table; "query": the reply to the question that has the policy's text after
            ``normalise_query``; a text that is not recorded is an error.
    """

    identity: Mapping[str, Any] | None = None  # already on disk

    def __init__(self, table: ReplyTable, member: str, by: By = "row") -> None:
        self._table = table
        self._member = member
        self._ids = {normalise_query(q["query"]): q["query_id"] for q in table.queries()} if by == "query" else None
        column = table.members.index(member)
        self._longest_prompt = int(table.matrix("prompt_tokens")[:, column].max())
        self._longest_reply = int(table.matrix("completion_tokens")[:, column].max())
        self._highest_usd = float(table.cost_matrix()[:, column].max())

    @property
    def max_tokens(self) -> int:
        return self._longest_reply

    def prompt_bound(self, query: str) -> int:
        return self._longest_prompt

    def highest_usd(self, query: str) -> float:
        return self._highest_usd

    async def send(self, query: str, timeout: float, query_id: str) -> Attempt:
        row = query_id if self._ids is None else self._ids.get(normalise_query(query))
        try:
            found = self._table.lookup(row or "", self._member)
        except KeyError:
            asked = f"query_id {query_id!r}" if self._ids is None else f"the text {query[:80]!r}"
            return Attempt(error=f"{BAD_REQUEST}: nothing is recorded for {asked}")
        text, reasoning = split_reasoning(found.reply)
        usage = Usage(found.prompt_tokens, found.completion_tokens, usd=found.cost)
        return Attempt(text, usage, seconds=found.seconds, reasoning=reasoning)

    async def aclose(self) -> None:
        pass


def recorded_pool(table: ReplyTable, *, by: By = "row", ledger: Ledger | None = None) -> Pool:
    """All members of a table; ``by`` as in ``RecordedMember``.

    Raises:
        ValueError: the table was recorded without replies.
    """
    if not table.has_replies:
        raise ValueError("the table has no column 'reply', and an agent reads replies; give a table that has one")
    return Pool(table.catalogue, {name: RecordedMember(table, name, by) for name in table.members}, ledger=ledger)
