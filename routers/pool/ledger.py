"""Who spent what. ``Account`` owns money with a cap; ``Ledger`` adds tokens, queries, steps and the run."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from operator import add, attrgetter
from typing import Any

from routers.data.billing import token_usd


class OverBudget(Exception):
    """A reservation does not fit into what is left."""


class Reservation:
    """An amount that is set aside until it is settled or cancelled. Made by ``Account.reserve``."""

    def __init__(self, account: Account, amount: float) -> None:
        self.amount = amount
        self._account = account
        self._open = True

    def settle(self, spent: float) -> None:
        """Spend ``spent``. What exceeds the reserved amount is booked as overrun; a report that is not a number >= 0
        is not believed, and costs the whole amount.

        Raises:
            RuntimeError: settled or cancelled before.
        """
        believed = spent if math.isfinite(spent) and spent >= 0 else self.amount
        if not self._account._close(self, min(believed, self.amount), max(0.0, believed - self.amount)):
            raise RuntimeError("this reservation was settled or cancelled before")

    def cancel(self) -> None:
        """Nothing was spent. Does nothing after ``settle`` or ``cancel``."""
        self._account._close(self, 0.0, 0.0)


class Account:
    """Money (or anything that adds up) with a cap: reserve an upper bound before, settle the real cost after.

    ``spent + reserved <= cap`` holds at every moment, whatever is reported, from any thread or task. A cost above its
    reservation (a wrong report, or tokens that the bound could not know) is not hidden: it is ``overrun``, lowers
    ``available``, and so stops further spending.

    Args:
        cap: in the unit of the amounts; None: no cap.

    Raises:
        ValueError: the cap is negative or not a number.
    """

    def __init__(self, cap: float | None = None) -> None:
        if cap is not None and not cap >= 0:
            raise ValueError(f"the cap is {cap!r}; use a number >= 0, or None for no cap")
        self.cap = cap
        self.spent = 0.0
        self.reserved = 0.0
        self.overrun = 0.0
        self._open = 0
        self._lock = threading.Lock()

    @property
    def available(self) -> float:
        """What a reservation may have at most; infinite without a cap."""
        if self.cap is None:
            return math.inf
        return max(0.0, self.cap - self.spent - self.reserved - self.overrun)

    def fits(self, amount: float) -> bool:
        """Whether ``reserve(amount)`` would succeed now."""
        return amount <= self.available

    def reserve(self, amount: float) -> Reservation:
        """Set ``amount`` aside.

        Raises:
            OverBudget: it does not fit.
            ValueError: it is negative or not finite.
        """
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError(f"cannot reserve {amount!r}; reserve a finite upper bound >= 0")
        with self._lock:
            if not self.fits(amount):
                raise OverBudget(f"{amount:.6g} does not fit: {self.available:.6g} of {self.cap:.6g} is left")
            self.reserved += amount
            self._open += 1
        return Reservation(self, amount)

    def charge(self, amount: float) -> None:
        """Spend without a reservation, for costs known only afterwards; what does not fit is overrun.

        Raises:
            ValueError: negative or not finite.
        """
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError(f"cannot charge {amount!r}; charge a finite amount >= 0")
        with self._lock:
            fitting = min(amount, self.available)
            self._spend(fitting, amount - fitting)

    def restart(self, amount: float) -> None:
        """Forget what was spent here and charge ``amount``: what a checkpoint says. Reservations stay."""
        with self._lock:
            self.spent = self.overrun = 0.0
        self.charge(amount)

    def _spend(self, amount: float, overrun: float) -> None:
        self.spent += amount
        self.overrun += overrun
        if self.cap is not None:  # sums of floats may pass the cap by a rounding error
            self.spent = min(self.spent, self.cap - self.reserved)

    def _close(self, reservation: Reservation, spent: float, overrun: float) -> bool:
        with self._lock:
            if not reservation._open:
                return False
            reservation._open = False
            self._open -= 1
            self.reserved = max(0.0, self.reserved - reservation.amount) if self._open else 0.0
            self._spend(spent, overrun)
            return True


@dataclass(frozen=True)
class Spending:
    """What was used. Costs are USD; tokens are those reported, failed attempts included, cached replies not."""

    calls: int = 0
    """Answered or failed by a member; not by the cache."""
    cached: int = 0
    failed: int = 0
    """Of the calls, those without an answer in the end."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    policy_prompt_tokens: int = 0
    policy_completion_tokens: int = 0
    policy_cost: float = 0.0
    estimated: int = 0
    """Attempts without (all of the) reported usage, counted at their upper bound."""
    bounded: int = 0
    """Attempts that reported more than was possible, or less than was seen, and count as what can be."""
    cached_tokens: int = 0
    """Of the prompt tokens, those that the provider read from its cache."""
    reasoning_tokens: int = 0
    """Of the completion tokens."""
    unmetered: int = 0
    """Failed attempts without reported usage, counted as nothing; a provider may have billed them."""
    seconds: float = 0.0
    """Of the answered calls, waiting for places and limits included."""
    cache_write_tokens: int = 0
    """Of the prompt tokens, those that the provider wrote to its cache."""
    saved: float = 0.0
    """USD that the providers' caches made calls cheaper; negative where more was written than read."""

    @property
    def latency(self) -> float | None:
        """Mean seconds of an answered call; None without one."""
        answered = self.calls - self.failed
        return self.seconds / answered if answered else None

    @property
    def usd(self) -> float:
        """Members and policy."""
        return self.cost + self.policy_cost

    def __add__(self, other: Spending) -> Spending:
        return Spending(*map(add, _numbers(self), _numbers(other)))


_numbers = attrgetter(*(field.name for field in fields(Spending)))


class Ledger:
    """Books every call of a process: per query, step, member and run. Safe from several threads.

    Args:
        max_cost_usd: cap of the run in this process; a call whose upper bound does not fit is not made. None: no cap.
        policy_price: USD per million prompt and completion tokens of the policy's own.

    Raises:
        ValueError: a negative cap or price.
    """

    def __init__(self, max_cost_usd: float | None = None, policy_price: tuple[float, float] = (0.0, 0.0)) -> None:
        if any(not (math.isfinite(price) and price >= 0) for price in policy_price):
            raise ValueError(f"policy_price is {policy_price!r}; use two numbers >= 0, USD per million tokens in, out")
        self.account = Account(max_cost_usd)
        self._policy_price = policy_price
        self.exhausted = False
        """A call was refused for lack of money: the run should stop with a checkpoint."""
        self.on_book: Callable[[str | None, Spending], None] | None = None
        """Told of every booking: who it was (None: the policy), and what was used."""
        self._run = Spending()
        self._step = Spending()
        self._queries: dict[str, Spending] = {}
        self._members: dict[str, Spending] = {}
        self._lock = threading.Lock()

    @property
    def spent_usd(self) -> float:
        """USD since the run began, overrun included."""
        return self.account.spent + self.account.overrun

    def reserve(self, amount: float) -> Reservation:
        """``Account.reserve``, and remembers a refusal in ``exhausted``."""
        try:
            return self.account.reserve(amount)
        except OverBudget:
            self.exhausted = True
            raise

    def book(self, query_id: str, spending: Spending, member: str | None = None) -> None:
        """Add what a query used, and at whom (None: the policy). The money itself went through ``account``."""
        with self._lock:
            self._run += spending
            self._step += spending
            before = self._queries.get(query_id)
            self._queries[query_id] = spending if before is None else before + spending
            if member is not None:
                before = self._members.get(member)
                self._members[member] = spending if before is None else before + spending
        if self.on_book is not None:
            self.on_book(member, spending)

    def policy(self, prompt_tokens: int, completion_tokens: int, query_id: str = "") -> float:
        """Book the policy's own tokens; returns their price in USD."""
        usd = float(token_usd(prompt_tokens, completion_tokens, *self._policy_price))
        self.account.charge(usd)
        used = Spending(
            policy_prompt_tokens=prompt_tokens, policy_completion_tokens=completion_tokens, policy_cost=usd
        )
        self.book(query_id, used)
        return usd

    def total(self) -> Spending:
        """Of the run, also of its part before a resume."""
        return self._run

    def step(self) -> Spending:
        """Since the last ``new_step``."""
        return self._step

    def query(self, query_id: str) -> Spending:
        """Of one query since the last ``new_step``."""
        return self._queries.get(query_id, Spending())

    def members(self) -> dict[str, Spending]:
        """Of the run, by member; members that nobody asked are not in it."""
        return dict(self._members)

    def new_step(self) -> Spending:
        """Returns ``step()`` and starts the next one."""
        with self._lock:
            done, self._step, self._queries = self._step, Spending(), {}
        return done

    def metrics(self) -> dict[str, float]:
        """Of the step, with the run's total, by the names under which they are logged."""
        step = self._step
        named = {f"pool/{f.name}": float(getattr(step, f.name)) for f in fields(step)}
        return {
            **named,
            "pool/usd": step.usd,
            "pool/run_usd": self.spent_usd,
            "pool/overrun_usd": self.account.overrun,
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the run's sums and the money spent. What is in flight is not part of it."""
        members = {name: asdict(spending) for name, spending in self._members.items()}
        money = {"spent": self.account.spent, "overrun": self.account.overrun}
        return {"run": asdict(self._run), "members": members, **money}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; the cap stays the one given now. More spent than the cap counts as overrun.

        Raises:
            KeyError, TypeError: not a ledger's state.
        """
        run, spent = Spending(**state["run"]), float(state["spent"]) + float(state["overrun"])
        members = {name: Spending(**spending) for name, spending in state["members"].items()}
        with self._lock:
            self._run, self._step, self._queries, self._members = run, Spending(), {}, members
        self.account.restart(spent)
