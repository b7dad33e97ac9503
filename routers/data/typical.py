"""What members' calls cost on average when a router learned, and what the same calls cost at the prices of today.

A router learns from calls that were paid at the prices of then. Where a catalogue re-prices its members, what it
foretells is re-priced with them:

    usd of today = usd of then x cost(today's prices, tokens) / cost(prices of then, tokens)

`tokens` are the member's mean prompt and reply in the training data. Without them the prices alone say it, where all
of them changed by one factor; else nothing does, and that is an error rather than the old price. Costs that were
measured without any prices (outcomes, a table's own `cost` without tokens) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from routers.data.billing import PriceTier, cost
from routers.data.catalogue import Member

if TYPE_CHECKING:
    from routers.data.table import ReplyTable

Tokens = Mapping[str, tuple[float, float]]
"""Member -> mean tokens of its prompts and replies."""
_PRICES = tuple(name for name in Member.__dataclass_fields__ if name.startswith("price_"))


class TypicalCalls:
    """What settings of routers share that know how long their members' calls are. A dataclass has the fields."""

    members: tuple[Member, ...]
    typical: Tokens
    """Mean tokens of a member's prompt and reply in the training data."""
    typical_usd: Mapping[str, float]
    """Mean USD of a member's reply in the training data, at its prices."""

    def expected_usd(self, member: Member) -> float | None:
        """Mean USD of a call at the member's prices now; None: nothing says.

        A member that was not there in training counts with the mean tokens of those that were.
        """
        trained = next((one for one in self.members if one.name == member.name), None)
        usd, tokens = self.typical_usd.get(member.name), self.typical.get(member.name)
        if trained is not None and usd is not None:
            change = price_change(trained, member, tokens, usd)
            return None if change is None else usd * change[0] + change[1]
        found = [tokens] if tokens else list(self.typical.values())
        if not found or not member.priced:
            return None
        read, written = (sum(column) / len(found) for column in zip(*found, strict=True))
        return cost(member, read, written)

    def with_members(self, members: Sequence[Member]) -> Self:
        """The same with another pool, or re-priced members: what their calls cost is told at their prices now."""
        usd = {member.name: self.expected_usd(member) for member in members}
        known = {name: value for name, value in usd.items() if value is not None}
        return replace(self, members=tuple(members), typical_usd=known)  # type: ignore[type-var]  # a dataclass is


def seen_in(table: ReplyTable) -> dict[str, Any]:
    """`typical` and `typical_usd` of a table's training split (of all of it if there is none)."""
    split = "train" if table.queries("train") else None
    usd = table.means("cost", split)
    tokens = [table.means(name, split).tolist() for name in ("prompt_tokens", "completion_tokens")]
    typical = dict(zip(table.members, zip(*tokens, strict=True), strict=True))
    return {
        "typical": {name: both for name, both in typical.items() if any(both)},  # else the table counts no tokens
        "typical_usd": dict(zip(table.members, map(float, usd), strict=True)),
    }


def price_change(
    then: Member, now: Member, tokens: tuple[float, float] | None = None, usd: float | None = None
) -> tuple[float, float] | None:
    """(factor, added USD) by which the cost of a member's calls changes with its prices; None where nothing says it.
    (1, 0) where they are the same, or were not known then and there are no tokens either.

    Args:
        then, now: the member at the prices that were paid, and at those of today.
        tokens: of its mean prompt and reply.
        usd: what its calls cost on average then, for a member whose prices were not known.
    """
    if all(getattr(then, name) == getattr(now, name) for name in _PRICES):
        return 1.0, 0.0
    if not then.priced and tokens is None:
        return 1.0, 0.0
    if not now.priced:
        return None
    if tokens is not None and any(tokens):
        before = cost(then, *tokens) if then.priced else usd
        if before is not None:
            after = cost(now, *tokens)
            return (after / before, 0.0) if before > 0 else (1.0, after)
    return _one_factor(then, now)


def _one_factor(then: Member, now: Member) -> tuple[float, float] | None:
    """Where all prices changed by it."""
    old, new = list(_amounts(then)), list(_amounts(now))
    if [name for name, _ in old] != [name for name, _ in new]:
        return None
    pairs = [(a, b) for (_, a), (_, b) in zip(old, new, strict=True) if a or b]
    if not pairs or not all(a > 0 for a, _ in pairs):
        return None
    factor = pairs[0][1] / pairs[0][0]
    return (factor, 0.0) if all(abs(b - factor * a) <= 1e-9 * max(a, b) for a, b in pairs) else None


def _amounts(member: Member) -> Iterable[tuple[str, float]]:
    for name in _PRICES:
        value = getattr(member, name)
        if name == "price_tiers":
            for tier in sorted(value, key=lambda tier: tier.above):
                found = {n: getattr(tier, n) for n in PriceTier.__dataclass_fields__ if n != "above"}
                yield from ((f"{tier.above} {n}", price) for n, price in found.items() if price is not None)
        elif value is not None:
            yield name, value
