"""Hard budgets: what may be chosen, what is booked, and that no trace of calls passes a cap."""

import asyncio
import math
import random

import pytest

from routers.pool.ledger import Account, OverBudget
from routers.tasks.step_routing.budget import Budget, BudgetGate

BOUNDS = {"small": 0.1, "large": 1.0}


def test_allowed_by_hand_in_dollars() -> None:
    gate = BudgetGate(Budget(1.15, "usd"))
    assert gate.allowed(BOUNDS, 20) == ["small", "large"]
    gate.account.charge(0.5)  # .65 left
    assert gate.allowed(BOUNDS, 20) == ["small"]
    gate.account.charge(0.6)  # .05 left
    assert gate.allowed(BOUNDS, 20) == []


def test_the_tail_stays_affordable() -> None:
    # After a large call two small ones must fit: 1 + .2 <= 1.25, but 1 + .3 > 1.25. With one step left, no tail.
    assert BudgetGate(Budget(1.25, "usd", tail_calls=2)).allowed(BOUNDS, 20) == ["small", "large"]
    assert BudgetGate(Budget(1.25, "usd", tail_calls=3)).allowed(BOUNDS, 20) == ["small"]
    assert BudgetGate(Budget(1.0, "usd", tail_calls=3)).allowed(BOUNDS, 1) == ["small", "large"]
    # The cheapest needs no tail of itself: it may spend what was kept for it.
    assert BudgetGate(Budget(0.25, "usd", tail_calls=2)).allowed(BOUNDS, 20) == ["small"]


def test_forced_small_keeps_the_rest_of_the_episode_affordable() -> None:
    gate = BudgetGate(Budget(2.0, "usd", on_empty="force_small"))
    gate.check_start(BOUNDS, 20)
    # 1 + 19 x .1 > 2, but 1 + 10 x .1 <= 2
    assert gate.allowed(BOUNDS, 20) == ["small"] and gate.allowed(BOUNDS, 11) == ["small", "large"]
    with pytest.raises(ValueError, match=r"at least 2\.1 usd for 21 steps of small"):
        gate.check_start(BOUNDS, 21)


def test_calls_are_counted_and_small_ones_are_free() -> None:
    gate = BudgetGate(Budget(2, "large_calls"))
    for _ in range(2):
        assert gate.allowed(BOUNDS, 20) == ["small", "large"]
        asyncio.run(gate.call("large", BOUNDS, answer, lambda _: 5.0))
    assert gate.allowed(BOUNDS, 20) == ["small"] and gate.remaining == 0 and gate.used == 1.0
    asyncio.run(gate.call("small", BOUNDS, answer, lambda _: 5.0))
    assert gate.account.spent == 2 and not gate.violated
    assert BudgetGate(Budget(0, "large_calls")).allowed(BOUNDS, 20) == ["small"]


async def answer() -> str:
    return "ok"


def test_settling_and_what_is_not_believed() -> None:
    gate = BudgetGate(Budget(10.0, "usd"))

    async def fail() -> None:
        raise ConnectionError("no route")

    asyncio.run(gate.call("large", BOUNDS, answer, lambda _: 0.25))
    assert gate.account.spent == pytest.approx(0.25)
    asyncio.run(gate.call("large", BOUNDS, answer, lambda _: math.nan))  # charged in full
    with pytest.raises(ConnectionError):
        asyncio.run(gate.call("large", BOUNDS, fail, lambda _: 0.0))  # may be billed: charged in full
    assert gate.account.spent == pytest.approx(2.25) and gate.account.reserved == 0 and not gate.violated
    asyncio.run(gate.call("large", BOUNDS, answer, lambda _: 1.5))  # beyond its bound: seen, and held against it
    assert gate.violated and gate.remaining == pytest.approx(10 - 2.25 - 1.5)


def test_a_shared_account_that_is_empty_by_now_calls_nobody() -> None:
    account, called = Account(1.0), []
    first, second = (BudgetGate(Budget(1.0, "usd"), account) for _ in range(2))

    async def slow() -> None:
        called.append(1)
        await asyncio.sleep(0.01)

    async def race() -> list:
        calls = [gate.call("large", BOUNDS, slow, lambda _: 1.0) for gate in (first, second)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(race())
    assert [type(r) for r in results] == [type(None), OverBudget] and called == [1] and account.spent == 1.0
    with pytest.raises(ValueError, match="cap"):
        BudgetGate(Budget(2.0, "usd"), account)


def test_ten_thousand_random_episodes_never_pass_their_cap() -> None:
    """Retries, failures, cancelled calls, concurrent episodes on one account, and reports that are wrong or absurd."""
    draw = random.Random(0)
    checked = 0

    async def episode(gate: BudgetGate, true: list[float], calls: list[str]) -> None:
        for left in range(draw.randint(1, 12), 0, -1):
            bounds = {"small": draw.uniform(0.0, 0.3), "medium": draw.uniform(0.3, 0.8), "large": draw.uniform(0.8, 2)}
            allowed = gate.allowed(bounds, left)
            if not allowed:
                return
            name = draw.choice(allowed)
            for _ in range(draw.choice((1, 1, 1, 3))):  # the caller retries: each attempt is a call of its own
                spends = draw.uniform(0, bounds[name])  # a call never bills more than its bound
                wrong = draw.choice((None, None, None, math.nan, -1.0, math.inf, "over"))
                kind = draw.random()

                async def act(name=name, spends=spends, kind=kind) -> float:
                    true.append(spends)
                    calls.append(name)
                    if draw.random() < 0.5:
                        await asyncio.sleep(0)
                    if kind < 0.1:
                        raise TimeoutError
                    if kind < 0.15:
                        raise asyncio.CancelledError
                    return spends

                def report(cost: float, wrong=wrong, bound=bounds[name]) -> float:
                    return cost if wrong is None else 3 * bound + 1 if wrong == "over" else wrong

                try:
                    await gate.call(name, bounds, act, report)
                    break
                except OverBudget:
                    return
                except (TimeoutError, asyncio.CancelledError):
                    pass
                finally:
                    account = gate.account
                    assert account.spent + account.reserved <= account.cap + 1e-12

    async def everything() -> None:
        nonlocal checked
        while checked < 10_000:
            unit = draw.choice(("usd", "large_calls"))
            cap = float(draw.randint(0, 5)) if unit == "large_calls" else draw.uniform(0.05, 6.0)
            budget = Budget(cap, unit, draw.randint(0, 3), draw.choice(("stop", "force_small")))
            account, together = Account(cap), draw.choice((1, 1, 2, 5))
            true: list[float] = []
            calls: list[str] = []
            gates = [BudgetGate(budget, account) for _ in range(together)]
            await asyncio.gather(*(episode(gate, true, calls) for gate in gates))
            checked += together
            assert account.spent <= cap and account.reserved == 0
            if unit == "usd":
                assert sum(true) <= cap + 1e-9  # the money that was really spent
            else:
                assert sum(name != "small" for name in calls) <= cap

    asyncio.run(everything())
    assert checked >= 10_000


@pytest.mark.parametrize(
    "bad", [{"cap": -1}, {"cap": math.nan}, {"cap": 1, "unit": "euro"}, {"cap": 1, "tail_calls": -1}, {"cap": 0.5}]
)
def test_budgets_that_make_no_sense(bad: dict) -> None:
    with pytest.raises(ValueError):
        Budget(**bad)
