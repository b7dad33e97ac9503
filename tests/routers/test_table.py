"""The table of recorded replies: every way to read it, and every way it can be wrong."""

import csv
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.data.catalogue import Member
from routers.data.table import ReplyTable, load_table, normalise_query, split_of

PRICES = {
    "cheap": Member("cheap", "x", 1.0, 2.0),
    "dear": Member("dear", "x", 10.0, 20.0),
    "idle": Member("idle", "never recorded", 1.0, 1.0),
}
YAML = """members:
  - {name: cheap, descriptor: x, price_in: 1, price_out: 2}
  - {name: dear, descriptor: x, price_in: 10, price_out: 20}
"""


def row(query_id="q1", member="cheap", **changes):
    base = {
        "query_id": query_id,
        "query": f"text of {query_id}?",
        "family": "f",
        "split": "train",
        "gold": ["one", "1"],
        "member": member,
        "reply": 'one\u2028two, "quoted"',
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "seconds": 0.5,
        "correct": 1.0,
    }
    return base | changes


def rows():
    return [
        row("q1", "dear", prompt_tokens=30),
        row("q1", "cheap"),
        row("q2", "cheap", split="heldout", correct=0.25),
        row("q2", "dear", split="heldout", prompt_tokens=1000),
        row("q3", "dear", prompt_tokens=50),
        row("q3", "cheap", correct=0.0),
    ]


def test_numbers_by_hand():
    table = ReplyTable(rows(), PRICES)
    assert table.members == ["cheap", "dear"]  # in the order of the catalogue, without the idle one
    assert len(table) == 3
    recorded = table.lookup("q1", "dear")
    assert recorded.cost == pytest.approx((30 * 10 + 5 * 20) / 1e6)
    assert (recorded.prompt_tokens, recorded.completion_tokens, recorded.seconds) == (30, 5, 0.5)
    assert table.queries("heldout") == [{"query_id": "q2", "query": "text of q2?", "family": "f", "split": "heldout"}]
    assert [query["query_id"] for query in table.queries()] == ["q1", "q2", "q3"]
    np.testing.assert_array_equal(table.correct_matrix(), [[1, 1], [0.25, 1], [0, 1]])
    np.testing.assert_allclose(table.cost_matrix("train"), [[20e-6, 400e-6], [20e-6, 600e-6]])
    # mean cost of the dearest member over the train split only: (400 + 600) / 2 micro-dollars
    assert table.max_cost == pytest.approx(500e-6)
    assert table.gold("q1") == ("one", "1")


def test_queries_are_copies():
    table = ReplyTable(rows(), PRICES)
    table.queries()[0]["query"] = "changed"
    assert table.queries()[0]["query"] == "text of q1?"


def test_unknown_pair_and_split():
    table = ReplyTable(rows(), PRICES)
    with pytest.raises(KeyError, match="nobody"):
        table.lookup("q1", "nobody")
    with pytest.raises(ValueError, match="'test' is unknown"):
        table.queries("test")


def test_max_cost_without_train_rows_or_prices():
    heldout = [row(split="heldout")]
    assert ReplyTable(heldout, PRICES).max_cost == pytest.approx(20e-6)
    assert ReplyTable(heldout, {"cheap": Member("cheap", "x", 0.0, 0.0)}).max_cost == 1.0
    assert ReplyTable(heldout, PRICES).correct_matrix("train").shape == (0, 1)


def test_optional_columns_have_defaults():
    short = {key: value for key, value in row().items() if key not in ("family", "split", "gold", "seconds")}
    table = ReplyTable([short], PRICES)
    assert table.queries() == [
        {"query_id": "q1", "query": "text of q1?", "family": "", "split": split_of("text of q1?")}
    ]
    assert table.lookup("q1", "cheap").seconds == 0.0
    assert table.gold("q1") == ()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_every_file_format_reads_the_same(tmp_path, suffix):
    (tmp_path / "catalogue.yaml").write_text(YAML)
    path = tmp_path / f"replies.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows()), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows()), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row()))
            writer.writeheader()
            writer.writerows(r | {"gold": json.dumps(r["gold"])} for r in rows())
    table, expected = load_table(path), ReplyTable(rows(), PRICES)
    assert table.queries() == expected.queries()
    for query in table.queries():
        for member in table.members:
            assert table.lookup(query["query_id"], member) == expected.lookup(query["query_id"], member)
        assert table.gold(query["query_id"]) == expected.gold(query["query_id"])


def test_hub_dataset(tmp_path, monkeypatch):
    import datasets

    made = {"train": rows()[:2] + rows()[4:], "test": rows()[2:4]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: made if name == "user/replies" else {})
    assert len(load_table("user/replies", PRICES)) == 3
    with pytest.raises(ValueError, match="user/replies: no prices"):
        load_table("user/replies")


def test_missing_file_and_catalogue(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        load_table(tmp_path / "none.parquet")
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    with pytest.raises(ValueError, match=r"catalogue\.yaml"):
        load_table(path)
    (tmp_path / "prices.yaml").write_text(YAML)
    assert load_table(path, tmp_path / "prices.yaml").members == ["cheap"]


def test_broken_json_and_csv_cells_are_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps(row()) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"replies\.jsonl: row 2: is not JSON"):
        load_table(path, PRICES)
    path = tmp_path / "replies.csv"
    path.write_text("query_id,query,member,reply,prompt_tokens,completion_tokens,correct\nq,t,cheap,r,many,1,1\n")
    with pytest.raises(ValueError, match=r"row 1: field 'prompt_tokens' is 'many'"):
        load_table(path, PRICES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_id": None}, ["query_id", "None"]),
        ({"query": "  "}, ["query", "empty"]),
        ({"reply": None}, ["reply", "None"]),
        ({"reply": [3]}, ["reply", "[3]", "text"]),
        ({"member": "stranger"}, ["stranger", "catalogue"]),
        ({"prompt_tokens": -1}, ["prompt_tokens", "-1"]),
        ({"prompt_tokens": 1.5}, ["prompt_tokens", "1.5"]),
        ({"completion_tokens": True}, ["completion_tokens", "True"]),
        ({"completion_tokens": "many"}, ["completion_tokens", "'many'"]),
        ({"completion_tokens": float("inf")}, ["completion_tokens", "inf"]),
        ({"completion_tokens": None}, ["completion_tokens", "None"]),
        ({"correct": 1.01}, ["correct", "1.01"]),
        ({"correct": float("nan")}, ["correct", "nan"]),
        ({"correct": None}, ["correct", "None"]),
        ({"correct": "yes"}, ["correct", "'yes'"]),
        ({"seconds": -0.1}, ["seconds", "-0.1"]),
        ({"split": "part 3"}, ["split", "'part 3'"]),
        ({"gold": "[one, two]"}, ["gold", "JSON"]),
        ({"gold": [None]}, ["gold", "[None]"]),
        ({"gold": {"a": 1}}, ["gold", "list of texts"]),
        ({"query": "x\ud835y"}, ["query", "Unicode at character 1"]),
        ({"reply": "x\ud835y"}, ["reply", "Unicode at character 1"]),
    ],
)
def test_a_bad_row_is_named(changes, words):
    with pytest.raises(ValueError) as caught:
        ReplyTable([row("q0"), row(**changes)], PRICES, source="replies.csv")
    for word in ["replies.csv: row 2", *words]:
        assert word in str(caught.value)


def test_a_missing_column_is_named():
    incomplete = row()
    del incomplete["correct"]
    with pytest.raises(ValueError, match="rows: column 'correct' is missing; there are query_id, query"):
        ReplyTable([incomplete], PRICES)
    with pytest.raises(ValueError, match="row 1: is list"):
        ReplyTable([[1, 2]], PRICES)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([row("q1", "cheap")], ["row 7", "q1", "cheap", "two rows"]),
        ([row("q4", "cheap")], ["'q4'", "dear", "no reply"]),
        ([row("q1", "dear", query="other")], ["two rows"]),
        ([row("q4", "cheap"), row("q4", "dear", query="other")], ["row 8", "query 'other' differs"]),
        ([row("q4", "cheap"), row("q4", "dear", split="heldout")], ["row 8", "split 'heldout' differs"]),
        ([row("q4", "cheap"), row("q4", "dear", gold=["2"])], ["row 8", "gold"]),
        ([row("q4", m, query="TEXT  of q2 ?") for m in ("cheap", "dear")], ["'q2'", "'q4'", "different splits"]),
    ],
)
def test_inconsistent_tables_are_named(extra, words):
    with pytest.raises(ValueError) as caught:
        ReplyTable(rows() + extra, PRICES)
    for word in words:
        assert word in str(caught.value)


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        ReplyTable([], PRICES)


def test_normalising():
    assert normalise_query("  What is\t2 + 3 ?! ") == "what is 2 + 3"
    assert normalise_query("2 + 3") != normalise_query("2 - 3")
    assert normalise_query("\uff21") == "a"  # full-width A


@given(st.text(st.characters(max_codepoint=0x24F)))
def test_normalising_twice_changes_nothing_and_decides_the_split(text):
    once = normalise_query(text)
    assert normalise_query(once) == once
    assert split_of(text) == split_of(once)


def test_split_is_fixed_and_about_one_in_four():
    # From sha256: these two must never move, or published numbers stop being comparable.
    assert [split_of("What is 2 + 3?"), split_of("WHAT is the capital of  Peru")] == ["heldout", "train"]
    counts = Counter(split_of(f"query {i}") for i in range(4000))
    assert 900 < counts["heldout"] < 1100


def priced(cost, query_id="q1", member="cheap", **changes):
    return row(query_id, member, cost=cost, **changes)


def test_a_cost_column_is_the_cost_and_rows_without_one_are_priced_by_tokens():
    table = ReplyTable([priced(0.25), row("q1", "dear"), priced(None, "q2"), priced(0, "q2", "dear")], PRICES)
    np.testing.assert_allclose(table.cost_matrix(), [[0.25, 200e-6], [20e-6, 0.0]], rtol=1e-12)
    assert table.max_cost == pytest.approx((0.25 + 20e-6) / 2)


@pytest.mark.parametrize("cost", [-0.01, float("nan"), float("inf"), "much", True, 1e9])
def test_a_cost_that_is_no_amount_of_usd_is_a_bad_row(cost):
    with pytest.raises(ValueError, match=r"row 1: field 'cost'"):
        ReplyTable([priced(cost), row("q1", "dear")], PRICES)


def test_a_cost_column_in_every_format(tmp_path):
    given = [priced(0.5, gold="[]"), priced("", "q2", gold="[]", query="another?")]
    catalogue = {"cheap": PRICES["cheap"]}
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, given[0].keys())
        writer.writeheader()
        writer.writerows(given)
    plain = [{**r, "gold": [], "cost": r["cost"] or None} for r in given]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in plain))
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        np.testing.assert_allclose(load_table(tmp_path / name, catalogue).cost_matrix(), [[0.5], [20e-6]])
