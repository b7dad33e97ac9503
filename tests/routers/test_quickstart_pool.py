"""The recorded pool that ships: complete, clean split, reproducible grades, and worth routing over."""

from collections import Counter
from importlib import resources

import numpy as np
import pytest
import yaml

from routers.data.table import normalise_query, quickstart_table, replies_of, split_of
from routers.quickstart.grade import grade


@pytest.fixture(scope="module")
def table():
    return quickstart_table()


def test_size(table):
    assert len(table) >= 1600
    assert table.members == ["fewshot", "chat", "calculator", "lookup", "python"]
    families = Counter(query["family"] for query in table.queries())
    assert len(families) >= 8 and min(families.values()) >= 100
    with resources.as_file(resources.files("routers.quickstart") / "data" / "quickstart_pool.parquet") as path:
        assert path.stat().st_size < 2_000_000


def test_a_catalogue_of_ones_own_gives_its_prices(table, tmp_path):
    """As `srpo train quickstart/own_pool --table quickstart --catalogue pool.yaml` does; never passed over."""
    members = [{"name": name, "descriptor": "x", "price_in": 0, "price_out": 8} for name in table.members]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"members": members}))
    how = {"max_bad_share": 0, "drop_incomplete": False, "folder": tmp_path}
    found = replies_of("quickstart", str(tmp_path / "pool.yaml"), **how)
    assert np.allclose(found.cost_matrix(), 8e-6 * table.matrix("completion_tokens"))
    assert np.array_equal(replies_of("quickstart", None, **how).cost_matrix(), table.cost_matrix())


def test_no_query_stands_twice(table):
    texts = [normalise_query(query["query"]) for query in table.queries()]
    assert len(set(texts)) == len(texts)


def test_split_is_by_text_and_in_every_family(table):
    assert all(query["split"] == split_of(query["query"]) for query in table.queries())
    heldout = Counter(query["family"] for query in table.queries("heldout"))
    assert len(table.queries("heldout")) / len(table) == pytest.approx(0.25, abs=0.03)
    assert min(heldout.values()) >= 20
    assert set(heldout) == {query["family"] for query in table.queries("train")}


def test_recorded_grades_follow_from_the_replies(table):
    for query in table.queries():
        gold = table.gold(query["query_id"])
        for member in table.members:
            recorded = table.lookup(query["query_id"], member)
            assert recorded.correct == grade(query["query"], recorded.reply, gold), (query, member)
            assert recorded.prompt_tokens > 0 and recorded.completion_tokens > 0 and recorded.seconds > 0


def test_grading_discriminates(table):
    """Replies of other queries of the family must not pass for this one."""
    queries = table.queries()
    passed = 0
    for first, second in zip(queries, queries[7:], strict=False):
        reply = table.lookup(second["query_id"], "python").reply
        passed += grade(first["query"], reply, table.gold(first["query_id"]))
    assert passed / len(queries) < 0.08


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_routing_pays(table, split):
    correct, cost = table.correct_matrix(split), table.cost_matrix(split)
    best = int(correct.mean(axis=0).argmax())
    assert correct.mean(axis=0)[best] < 0.65
    assert correct.max(axis=1).mean() > correct.mean(axis=0)[best] + 0.2  # the oracle is far above
    assert cost.mean(axis=0)[best] > 1.5 * cost.mean(axis=0).min()  # and the best one is not the cheapest
    families = np.array([query["family"] for query in table.queries(split)])
    winners = {int(correct[families == family].mean(axis=0).argmax()) for family in set(families)}
    assert len(winners) >= 3


def test_a_perfect_family_router_beats_the_best_member_at_lower_cost(table):
    """Choosing by family alone, learned on train rows, already does: so the pool can be learned from the text."""
    families = {split: np.array([q["family"] for q in table.queries(split)]) for split in ("train", "heldout")}
    train, heldout, cost = table.correct_matrix("train"), table.correct_matrix("heldout"), table.cost_matrix("heldout")
    choice = {f: int(train[families["train"] == f].mean(axis=0).argmax()) for f in set(families["train"])}
    picked = np.array([choice[family] for family in families["heldout"]])
    rows = np.arange(len(picked))
    best = int(train.mean(axis=0).argmax())
    assert heldout[rows, picked].mean() > heldout[:, best].mean() + 0.1
    assert cost[rows, picked].mean() < cost[:, best].mean()
