"""The account is never above its cap, whatever is reported and however many spend at once; the ledger adds up."""

import asyncio
import json
import math
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Fault, Scripted

from routers.data.catalogue import Member
from routers.pool import Account, Ledger, OverBudget, Pool, Retry, Spending, kind
from srpo.types import Usage


def test_reserve_settle_and_cancel_by_hand():
    account = Account(1.0)
    first, second = account.reserve(0.6), account.reserve(0.3)
    assert account.reserved == pytest.approx(0.9) and account.available == pytest.approx(0.1)
    with pytest.raises(OverBudget, match=r"0\.2 does not fit"):
        account.reserve(0.2)
    first.settle(0.25)  # gives 0.35 back
    assert account.spent == 0.25 and account.available == pytest.approx(0.45)
    second.cancel()
    assert account.available == pytest.approx(0.75) and account.reserved == 0.0
    second.cancel()
    with pytest.raises(RuntimeError):
        second.settle(0.1)
    with pytest.raises(RuntimeError):
        first.settle(0.1)
    assert account.spent == 0.25
    account.reserve(0.75).settle(0.75)  # the last cent can be spent
    assert account.spent == 1.0 and not account.fits(1e-9) and account.fits(0.0)


@pytest.mark.parametrize(("reported", "spent", "overrun"), [(0.5, 0.2, 0.3), (math.nan, 0.2, 0.0), (-1.0, 0.2, 0.0)])
def test_wrong_reports(reported, spent, overrun):
    account = Account(1.0)
    account.reserve(0.2).settle(reported)
    assert (account.spent, account.overrun) == pytest.approx((spent, overrun))
    assert account.available == pytest.approx(1.0 - spent - overrun)


def test_infinite_reports_cost_the_reservation():
    account = Account(1.0)
    account.reserve(0.2).settle(math.inf)
    assert account.spent == 0.2


@pytest.mark.parametrize("amount", [-1.0, math.nan, math.inf])
def test_bad_amounts_are_refused(amount):
    account = Account(None)
    with pytest.raises(ValueError):
        account.reserve(amount)
    with pytest.raises(ValueError):
        account.charge(amount)
    assert account.available == math.inf
    with pytest.raises(ValueError):
        Ledger(policy_price=(0.0, amount))


def test_a_negative_cap_is_refused():
    with pytest.raises(ValueError, match="cap"):
        Account(-0.1)
    with pytest.raises(ValueError, match="cap"):
        Account(math.nan)


amounts = st.floats(0.0, 0.5, allow_nan=False)
reports = st.one_of(amounts, st.floats(0.0, 1e6), st.sampled_from([math.nan, math.inf, -1.0, -math.inf]))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), amounts),
        st.tuples(st.just("settle"), reports),
        st.tuples(st.just("cancel"), st.just(0.0)),
        st.tuples(st.just("charge"), amounts),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(cap=st.floats(0.0, 3.0), steps=actions, picks=st.randoms(use_true_random=False))
def test_never_above_the_cap(cap, steps, picks):
    account = Account(cap)
    held, charged, settled = [], 0.0, 0.0
    for action, value in steps:
        if action == "reserve":
            before = account.available
            try:
                held.append(account.reserve(value))
                assert value <= before
            except OverBudget:
                assert value > before
        elif action == "charge":
            account.charge(value)
            charged += value
        elif held:
            reservation = held.pop(picks.randrange(len(held)))
            if action == "cancel":
                reservation.cancel()
            else:
                reservation.settle(value)
                settled += value if math.isfinite(value) and value >= 0 else reservation.amount
        assert 0.0 <= account.spent <= cap
        assert account.spent + account.reserved <= cap * (1 + 1e-12)
        assert account.reserved == pytest.approx(sum(r.amount for r in held), abs=1e-9)
        # nothing is hidden: what was reported is spent or overrun
        assert account.spent + account.overrun == pytest.approx(charged + settled, rel=1e-9, abs=1e-9)


def test_threads_do_not_pass_the_cap():
    account, wrong = Account(1.0), []

    def spend(seed: int) -> None:
        for i in range(3000):
            try:
                reservation = account.reserve(0.001 * ((i * seed) % 7 + 1))
            except OverBudget:
                continue
            if account.spent + account.reserved > 1.0 + 1e-9:
                wrong.append(i)
            if (i + seed) % 3:
                reservation.cancel()
            else:
                reservation.settle(reservation.amount / 10)

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and account.reserved == 0.0 and 0.5 < account.spent <= 1.0


MEMBER = Member("m", "x", 100_000.0, 200_000.0)  # 0.1 USD a prompt token, 0.2 USD a completion token


def scripted(*faults, **options) -> Scripted:
    return Scripted(prompt_tokens=2, completion_tokens=4, faults=faults, **options)  # a call costs 0.2 + 0.8 = 1 USD


def pool_of(backend: Scripted, ledger: Ledger) -> Pool:
    return Pool({"m": MEMBER}, {"m": backend}, ledger=ledger, retry=Retry(base=0.001))


def ask_many(pool: Pool, count: int, deadline: float = 5.0, **options):
    async def main():
        calls = [pool.ask("m", f"q{i}", deadline, query_id=f"id{i % 2}", **options) for i in range(count)]
        return await asyncio.gather(*calls)

    return asyncio.run(main())


def test_a_capped_run_stops_before_the_call_that_does_not_fit():
    backend, ledger = scripted(seconds=0.01), Ledger(max_cost_usd=3.5)
    replies = ask_many(pool_of(backend, ledger), 10)
    assert sum(reply.error is None for reply in replies) == 3  # 3 USD spent, 0.5 left
    assert {kind(reply) for reply in replies} == {None, "over budget"}
    assert len(backend.queries) == 3 and ledger.exhausted
    assert ledger.spent_usd == pytest.approx(3.0) and ledger.account.reserved == 0.0


def test_failed_attempts_that_were_billed_are_paid():
    used = Usage(2, 1)  # 0.2 + 0.2
    backend = scripted(Fault(error="server error: 500", usage=used), Fault(error="connection: reset"), None)
    ledger = Ledger()
    (reply,) = ask_many(pool_of(backend, ledger), 1)
    assert reply.error is None and reply.usage == Usage(4, 5)
    assert reply.cost == pytest.approx(1.4) == ledger.total().cost == ledger.spent_usd


def test_every_attempt_is_reserved_and_may_be_the_one_that_does_not_fit():
    backend = scripted(Fault(error="server error: 500", usage=Usage(2, 4)))
    ledger = Ledger(max_cost_usd=1.5)
    (reply,) = ask_many(pool_of(backend, ledger), 1)
    assert kind(reply) == "over budget" and reply.cost == pytest.approx(1.0)
    assert len(backend.queries) == 1 and ledger.spent_usd == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("max_cost", "attempts", "error"), [(0.9, 0, "over budget"), (1.5, 1, "over budget"), (2.0, 2, None)]
)
def test_a_call_with_a_limit_of_its_own(max_cost, attempts, error):
    backend, ledger = scripted(Fault(error="server error: 500", usage=Usage(2, 4))), Ledger()
    (reply,) = ask_many(pool_of(backend, ledger), 1, max_cost=max_cost)
    assert kind(reply) == error and len(backend.queries) == attempts
    assert reply.cost == pytest.approx(attempts) and reply.cost <= max_cost
    assert not ledger.exhausted  # the run has money


def test_a_cancelled_call_is_booked_with_what_it_cost():
    backend = scripted(Fault(error="server error: 500", usage=Usage(2, 4)), Fault(hang=True))
    ledger = Ledger()
    pool = pool_of(backend, ledger)

    async def main():
        call = asyncio.create_task(pool.ask("m", "q", 60.0))
        while len(backend.queries) < 2:
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(main())
    total = ledger.total()
    assert (total.calls, total.failed, total.cost, total.unmetered) == (1, 1, pytest.approx(1.0), 1)
    assert ledger.spent_usd == pytest.approx(1.0) and ledger.account.reserved == 0.0


def test_sums_and_latency_per_member():
    ledger = Ledger()
    members = {name: Member(name, "x", 1e5, 2e5) for name in "ab"}
    slow, failing = scripted(seconds=0.05), scripted(Fault(error="bad request: no", retry=False))
    pool = Pool(members, {"a": slow, "b": failing}, ledger=ledger)

    async def main():
        await asyncio.gather(*(pool.ask(name, "q", 5.0) for name in "aab"))

    asyncio.run(main())
    spent = ledger.members()
    assert (spent["a"].calls, spent["a"].cost, spent["b"].failed) == (2, pytest.approx(2.0), 1)
    assert 0.05 <= spent["a"].latency < 0.5 and spent["b"].latency is None


@settings(max_examples=60, deadline=None)
@given(
    cap=st.floats(0.0, 12.0),
    faults=st.lists(
        st.sampled_from(
            [
                None,
                Fault(error="server error: 500", usage=Usage(2, 4)),
                Fault(error="bad request: no", retry=False),
                Fault(usage=Usage(2, 40_000)),
                Fault(usage=Usage(0, 0)),
                Fault(raises=OSError("gone")),
                Fault(hang=True),
            ]
        ),
        max_size=20,
    ),
)
def test_no_fault_and_no_report_passes_the_cap(cap, faults):
    """Concurrent calls with retries, failures, hangs and wrong reports: the cap holds, every dollar is accounted."""
    ledger = Ledger(max_cost_usd=cap)
    pool = pool_of(scripted(*faults), ledger)
    replies = ask_many(pool, 12, deadline=0.02 if any(f is not None and f.hang for f in faults) else 5.0)
    assert ledger.account.spent <= cap and ledger.account.reserved == 0.0
    assert ledger.spent_usd == pytest.approx(sum(reply.cost for reply in replies))
    assert ledger.total().cost == pytest.approx(ledger.spent_usd)


def test_sums_per_query_step_and_run():
    ledger = Ledger(policy_price=(1e6, 2e6))
    pool = pool_of(scripted(None, Fault(error="bad request: no", retry=False)), ledger)
    ask_many(pool, 4)  # id0: calls 0 and 2, id1: calls 1 (fails) and 3
    assert ledger.policy(3, 5, "id0") == 13.0  # 3 x 1 + 5 x 2
    assert replace(ledger.query("id0"), seconds=0.0) == Spending(
        calls=2,
        prompt_tokens=4,
        completion_tokens=8,
        cost=2.0,
        policy_prompt_tokens=3,
        policy_completion_tokens=5,
        policy_cost=13.0,
    )
    assert ledger.query("id0").seconds > 0
    assert (ledger.query("id1").calls, ledger.query("id1").failed, ledger.query("id1").cost) == (2, 1, 1.0)
    assert ledger.query("nobody") == Spending()
    assert ledger.step().usd == ledger.total().usd == 16.0
    metrics = ledger.metrics()
    assert (metrics["pool/usd"], metrics["pool/calls"], metrics["pool/failed"]) == (16.0, 4.0, 1.0)
    assert ledger.new_step().usd == 16.0
    assert ledger.step() == ledger.query("id0") == Spending()
    ask_many(pool, 1)
    assert (ledger.step().usd, ledger.total().usd, ledger.metrics()["pool/run_usd"]) == (1.0, 17.0, 17.0)


def test_the_policys_own_tokens_count_against_the_cap():
    ledger = Ledger(max_cost_usd=1.5, policy_price=(1e6, 1e6))
    ledger.policy(1, 0)
    (reply,) = ask_many(pool_of(scripted(), ledger), 1)
    assert kind(reply) == "over budget"
    ledger.policy(0, 2)  # known only afterwards: 0.5 fits, 1.5 is overrun
    assert ledger.spent_usd == 3.0 and ledger.account.spent == 1.5


def test_a_resumed_ledger_goes_on_where_it_was():
    first = Ledger(max_cost_usd=10.0)
    ask_many(pool_of(scripted(), first), 3)
    state = json.loads(json.dumps(first.state_dict()))
    second = Ledger(max_cost_usd=4.5)
    account, pool = second.account, pool_of(scripted(), second)
    second.load_state_dict(state)
    assert second.account is account and second.members() == first.members()
    assert second.spent_usd == first.spent_usd == 3.0 and second.total() == first.total()
    assert second.step() == Spending()
    replies = ask_many(pool, 3)
    assert sum(reply.error is None for reply in replies) == 1 and second.spent_usd == 4.0
    tight = Ledger(max_cost_usd=2.0)
    tight.load_state_dict(state)
    assert tight.spent_usd == 3.0 and tight.account.available == 0.0
