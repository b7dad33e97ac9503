"""A router that is loaded with today's prices foretells today's costs, and chooses by them."""

import dataclasses

import pytest

from routers.baselines import BASELINES
from routers.data.billing import PriceTier, cost
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.data.typical import price_change, seen_in
from routers.evaluation.episodes import Outcomes, RewardRule
from routers.router import load_router, read_router
from routers.tasks.query_routing.encoder.training import train_encoder
from routers.tasks.query_routing.settings import QuerySettings

CHEAP, DEAR = Member("cheap", "small", 1.0, 2.0), Member("dear", "large", 10.0, 20.0)
TOKENS = {"cheap": (100, 50), "dear": (100, 30)}


def table(**cost_of):
    """Both are right everywhere, so that only prices tell them apart."""
    rows = [
        {"query_id": f"{i}", "query": f"{('sum', 'name', 'list')[i % 3]} {i}", "member": member, "correct": 1,
         "split": "train", "prompt_tokens": TOKENS[member][0], "completion_tokens": TOKENS[member][1], **cost_of}
        for i in range(40) for member in TOKENS
    ]  # fmt: skip
    return ReplyTable(rows, {"cheap": CHEAP, "dear": DEAR})


@pytest.mark.parametrize(
    ("now", "tokens", "usd", "change"),
    [
        (CHEAP, None, None, (1.0, 0.0)),
        (dataclasses.replace(CHEAP, descriptor="other", cache_seconds=300.0), None, None, (1.0, 0.0)),
        # (100 x 3 + 50 x 2) / (100 x 1 + 50 x 2)
        (dataclasses.replace(CHEAP, price_in=3.0), (100, 50), None, (2.0, 0.0)),
        # (200 + 50 x 4e-6's) / 200: what is not in a prompt's two numbers counts too
        (dataclasses.replace(CHEAP, price_request=200e-6), (100, 50), None, (2.0, 0.0)),
        (dataclasses.replace(CHEAP, price_tiers=(PriceTier(99, 2.0, 4.0),)), (100, 50), None, (2.0, 0.0)),
        # without tokens: only where all changed by one factor
        (dataclasses.replace(CHEAP, price_in=3.0, price_out=6.0), None, None, (3.0, 0.0)),
        (dataclasses.replace(CHEAP, price_in=0.0, price_out=0.0), None, None, (0.0, 0.0)),
        (dataclasses.replace(CHEAP, price_in=3.0), None, None, None),
        (dataclasses.replace(CHEAP, price_in=3.0, price_out=6.0, price_cached=0.1), None, None, None),
        (Member("cheap", "no prices"), (100, 50), None, None),
    ],
)
def test_how_a_change_of_prices_changes_costs(now, tokens, usd, change):
    found = price_change(CHEAP, now, tokens, usd)
    assert found == (None if change is None else pytest.approx(change))


def test_from_nothing_and_from_a_cost_without_prices():
    free, unknown = Member("m", "x", 0.0, 0.0), Member("m", "x")
    assert price_change(free, CHEAP, (100, 50)) == (1.0, pytest.approx(200e-6))
    assert price_change(free, CHEAP) is None
    assert price_change(unknown, CHEAP, (100, 50), 50e-6) == (pytest.approx(4.0), 0.0)
    assert price_change(unknown, CHEAP, None, 50e-6) == (1.0, 0.0)  # nothing was known that could have changed
    tiered = Member("m", "x", 1.0, 2.0, price_tiers=(PriceTier(5, 2.0, 3.0),))
    twice = Member("m", "x", 2.0, 4.0, price_tiers=(PriceTier(5, 4.0, 6.0),))
    assert price_change(tiered, twice) == (2.0, 0.0)
    assert price_change(tiered, dataclasses.replace(twice, price_tiers=(PriceTier(6, 4.0, 6.0),))) is None


NOW = {
    "cheap": dataclasses.replace(CHEAP, price_in=2.0, price_out=4.0),
    "dear": dataclasses.replace(DEAR, price_in=0.1, price_out=0.2),
}
"""Today the cheap one is the dear one: $0.0004 a call, and $0.000016."""


@pytest.mark.parametrize("name", ["TF-IDF ridge", "TF-IDF kNN", "MLP"])
def test_a_fitted_router_foretells_and_chooses_by_today_s_prices(tmp_path, name):
    router = BASELINES[name].how().fit(table(), cost_weight=1.0)
    then = router.route("sum 3")
    assert then.member == "cheap" and then.usd == pytest.approx(200e-6, rel=0.02)
    router.save(tmp_path)
    assert load_router(tmp_path).route("sum 3").usd == then.usd
    with load_router(tmp_path, catalogue=NOW) as today:
        decision = today.route("sum 3")
        assert decision.member == "dear" and decision.usd == pytest.approx(16e-6, rel=0.02)
        only = today.route("sum 3", members=["cheap"])
        assert only.usd == pytest.approx(2 * then.usd, rel=1e-9)
    assert read_router(tmp_path).settings["typical"]["cheap"] == [100.0, 50.0]


def test_a_fitted_router_that_cannot_tell_says_so(tmp_path):
    known = table()
    outcomes = Outcomes.of_table(known, RewardRule(known.max_cost, 0.2), "train")
    BASELINES["TF-IDF ridge"].how().fit(outcomes).save(tmp_path / "outcomes")  # members without any prices
    assert load_router(tmp_path / "outcomes", catalogue=NOW).route("sum 3").usd == pytest.approx(200e-6, rel=0.02)
    BASELINES["TF-IDF ridge"].how().fit(known).save(tmp_path / "before")  # as before token counts were kept
    path = tmp_path / "before" / "router.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("  typical:")])
    assert load_router(tmp_path / "before").route("sum 3").usd == pytest.approx(200e-6, rel=0.02)
    assert load_router(tmp_path / "before", catalogue=NOW).route("sum 3", members=["cheap"]).usd == pytest.approx(
        400e-6, rel=0.02
    )  # all its prices changed by one factor
    odd = {**NOW, "cheap": dataclasses.replace(CHEAP, price_out=9.0)}
    with pytest.raises(ValueError, match=r"cheap has other prices than the router was fitted with.*fit it again"):
        load_router(tmp_path / "before", catalogue=odd)
    assert load_router(tmp_path / "before", catalogue=odd, members=["dear"]).route("sum 3").member == "dear"


def test_the_encoder_foretells_and_chooses_by_today_s_prices_and_keeps_them(tmp_path):
    known = table()
    made = train_encoder(known, RewardRule(known.max_cost, 1.0), max_steps=20)
    made.save(tmp_path / "then")
    with load_router(tmp_path / "then") as then, load_router(tmp_path / "then", catalogue=NOW) as today:
        assert (then.route("sum 3").member, today.route("sum 3").member) == ("cheap", "dear")
        assert today.route("sum 3", members=["cheap"]).usd == pytest.approx(400e-6)
        today.save(tmp_path / "now")
    with load_router(tmp_path / "now") as again:  # as its pool was saved
        assert again.route("sum 3", members=["cheap"]).usd == pytest.approx(400e-6)
        assert again.settings.typical_usd["dear"] == pytest.approx(cost(NOW["dear"], 100, 30))
        assert again.route("sum 3").scores == pytest.approx(today.route("sum 3").scores, abs=1e-6)


def test_a_price_that_no_prompt_shows_is_a_price():
    settings = QuerySettings((CHEAP, DEAR)).seen_in(table())
    fee = dataclasses.replace(CHEAP, price_request=0.01)
    assert fee.token_prices == CHEAP.token_prices
    assert settings.expected_usd(CHEAP) == pytest.approx(200e-6)
    assert settings.expected_usd(fee) == pytest.approx(0.0102)
    assert settings.expected_usd(Member("new", "x", 1.0, 1.0)) == pytest.approx(140e-6)  # mean of (100, 50), (100, 30)
    assert settings.expected_usd(Member("new", "x")) is None


def test_costs_of_a_table_stay_and_are_scaled():
    """What a table's own column says of then is scaled by the prices, not replaced by them."""
    rows = table(cost=500e-6)
    settings = QuerySettings((CHEAP, DEAR)).seen_in(rows)
    assert settings.expected_usd(CHEAP) == pytest.approx(500e-6)
    twice = dataclasses.replace(CHEAP, price_in=2.0, price_out=4.0)
    assert settings.expected_usd(twice) == pytest.approx(1000e-6)
    assert settings.with_members([twice]).expected_usd(twice) == pytest.approx(1000e-6)
    assert seen_in(rows)["typical"]["dear"] == (100.0, 30.0)
