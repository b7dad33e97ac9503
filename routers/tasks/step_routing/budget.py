"""Hard budgets of one episode: an upper bound is reserved before every call, and what does not fit cannot be chosen.

    allowed = { m : ub(m) + tail(m) <= cap - spent - reserved }

    ub(m)    upper bound of the call: USD; or, where calls are counted, 1 for an expensive executor, 0 for the cheapest
    tail(m)  what must remain affordable afterwards, so that the episode can end: `tail_calls` calls of the cheapest
             executor, at most as many as steps are left; 0 for the cheapest itself

When nothing fits the episode ends (`stop`), or never comes to that: `force_small` keeps all remaining steps affordable
on the cheapest executor, and refuses a cap that cannot pay for them. Its bound is the current one; where bounds grow
(a language model's prompt does), the episode may still have to stop. The cap is not passed, as long as no call costs
more than its bound; reports below the truth cannot be noticed.

Source: budget-constrained decoding of Budget-Aware Agentic Routing (arXiv 2602.21227), caps as numbers of large calls;
INFERRED: the dollar version, the tail, and settling after the call. `routers.pool.Account` books the money.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from routers.pool.ledger import Account, Reservation
from srpo.ranges import Ranges, at_least, check_numbers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Budget:
    """The limit of one episode.

    Raises:
        ValueError: a cap that is negative or not a number, or a part of a call, which would buy none; an unknown word,
            a negative tail.
    """

    RANGES: ClassVar[Ranges] = {"cap": at_least(0), "tail_calls": at_least(0)}

    cap: float | None
    """In `unit`; None: no limit."""
    unit: Literal["usd", "large_calls"] = "large_calls"
    tail_calls: int = 0
    """Calls of the cheapest executor that an expensive call must leave affordable."""
    on_empty: Literal["stop", "force_small"] = "stop"

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.unit not in ("usd", "large_calls") or self.on_empty not in ("stop", "force_small"):
            raise ValueError(f"unit={self.unit!r}, on_empty={self.on_empty!r}: usd|large_calls and stop|force_small")
        if self.unit == "large_calls" and self.cap is not None and self.cap % 1:
            raise ValueError(
                f"a cap of {self.cap:g}: calls of the expensive executor are counted: give a whole number of them, or "
                "a cap in USD (recipes: budget_unit: usd, srpo serve: --conversation_unit usd, srpo play: --unit usd)"
            )


class BudgetGate:
    """Keeps one episode within its budget.

    Args:
        budget: the limit.
        account: books it; episodes that share a budget share an account with the budget's cap.

    Raises:
        ValueError: an account with another cap.
    """

    def __init__(self, budget: Budget, account: Account | None = None) -> None:
        self.budget = budget
        self.account = Account(budget.cap) if account is None else account
        if self.account.cap != budget.cap:
            raise ValueError(f"the account's cap is {self.account.cap}, the budget's {budget.cap}")

    def allowed(self, bounds: Mapping[str, float], steps_left: int) -> list[str]:
        """Executors whose call fits now, in the order of `bounds`.

        Args:
            bounds: upper bound in USD of the next call of every executor, the cheapest first.
            steps_left: steps that the episode may still take, this one included.
        """
        cheapest = next(iter(bounds))
        after = steps_left - 1
        calls = after if self.budget.on_empty == "force_small" else min(self.budget.tail_calls, after)
        tail = calls * self._amount(cheapest, bounds)
        needs = {name: self._amount(name, bounds) + (0.0 if name == cheapest else tail) for name in bounds}
        available = self.account.available
        return [name for name, need in needs.items() if need <= available]

    def check_start(self, bounds: Mapping[str, float], steps: int) -> None:
        """Refuse a `force_small` budget that cannot pay for an episode of `steps` calls of the cheapest executor.

        Raises:
            ValueError: says what is missing.
        """
        cheapest = next(iter(bounds))
        need = steps * self._amount(cheapest, bounds)
        if self.budget.on_empty == "force_small" and not self.account.fits(need):
            raise ValueError(
                f"force_small needs a cap of at least {need:g} {self.budget.unit} for {steps} steps of {cheapest}; "
                f"available are {self.account.available:g}. Raise the cap or use on_empty: stop"
            )

    async def call(
        self,
        name: str,
        bounds: Mapping[str, float],
        act: Callable[[], Awaitable[Result]],
        usd: Callable[[Result], float],
    ) -> Result:
        """Reserve, call, settle. A call that raises or is cancelled costs its whole reservation: it may be billed.

        Raises:
            routers.pool.OverBudget: it does not fit any more (somebody else used the account); nothing was called.
        """
        reservation = self.reserve(name, bounds)
        cost = math.nan  # not believed, hence charged in full
        try:
            result = await act()
            cost = usd(result)
        finally:
            self.settle(reservation, cost)
        return result

    def reserve(self, name: str, bounds: Mapping[str, float]) -> Reservation:
        """Set aside what a call of this executor costs at most; `settle` it afterwards.

        Raises:
            routers.pool.OverBudget: it does not fit.
        """
        return self.account.reserve(self._amount(name, bounds))

    def settle(self, reservation: Reservation, usd: float) -> None:
        """The call is over and cost this. What is not a number >= 0 is not believed, and costs its reservation."""
        reservation.settle(usd if self.budget.unit == "usd" else reservation.amount)

    @property
    def remaining(self) -> float:
        """In the budget's unit; infinite without a cap."""
        return self.account.available

    @property
    def begun(self) -> bool:
        """Whether the account was used before."""
        account = self.account
        return account.spent + account.reserved + account.overrun > 0

    @property
    def used(self) -> float | None:
        """Share of the cap that is spent, above 1 only where `violated`; None without a cap or with a cap of 0."""
        return (self.account.spent + self.account.overrun) / self.budget.cap if self.budget.cap else None

    @property
    def violated(self) -> bool:
        """Whether more was spent than the cap allows: reports above a call's upper bound are the only way."""
        return self.account.overrun > 0

    def _amount(self, name: str, bounds: Mapping[str, float]) -> float:
        if self.budget.unit == "usd":
            return bounds[name]
        return 0.0 if name == next(iter(bounds)) else 1.0
