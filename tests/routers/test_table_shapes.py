"""Shapes that programs write tables in: each must load as the same table, or say what is wrong with it."""

from __future__ import annotations

import codecs
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.data import cells
from routers.data.files import BadRow, read_rows
from routers.data.table import ReplyTable, load_table

CATALOGUE = "members:\n" + "".join(
    f"  - {{name: {name}, descriptor: d, price_in: 1.0, price_out: 10.0}}\n" for name in "ab"
)
HEADER = "query_id,query,member,reply,prompt_tokens,completion_tokens,correct"


def rows(**more: Any) -> list[dict[str, Any]]:
    return [
        {
            "query_id": f"q{i}",
            "query": f"question {i}",
            "member": member,
            "reply": f"{i}{member}",
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "correct": 1.0,
            **more,
        }
        for i in range(3)
        for member in "ab"
    ]


@pytest.fixture
def load(tmp_path: Path):
    (tmp_path / "catalogue.yaml").write_text(CATALOGUE)

    def of(name: str, content: str | bytes) -> ReplyTable:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_table(path)

    return of


def is_that_table(table: ReplyTable) -> None:
    assert [query["query_id"] for query in table.queries()] == ["q0", "q1", "q2"] and not table.bad_rows
    assert table.lookup("q2", "b").reply == "2b"
    assert table.lookup("q1", "a").cost == pytest.approx((5 * 1.0 + 3 * 10.0) / 1e6)


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table", "values"])
def test_what_pandas_writes_as_json(orient: str, load) -> None:
    text = pd.DataFrame(rows()).to_json(orient=orient)
    if orient == "values":  # without names
        with pytest.raises(ValueError, match=r"row 1: is list, not a mapping of columns"):
            load("t.json", text)
    else:
        is_that_table(load("t.json", text))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"version": "1.1", "data": rows()}),
        json.dumps({"data": rows()}),
        "\n".join(map(json.dumps, rows())),
    ],
)
def test_other_shapes_of_json(text: str, load) -> None:
    is_that_table(load("t.json", text))


def test_a_list_under_the_name_of_lines(load) -> None:
    is_that_table(load("t.jsonl", json.dumps(rows())))
    is_that_table(load("t.jsonl", "[\n" + ",\n".join(map(json.dumps, rows())) + "\n]\n"))


def test_a_row_of_another_length_in_pandas_split_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"columns": ["a", "b"], "index": [0, 1], "data": [[1, 2], [3]]}))
    good, bad = (row.value for row in read_rows(path))
    assert (
        good == {"a": 1, "b": 2}
        and isinstance(bad, BadRow)
        and bad.detail == ("is no list of 2 values, as the columns are")
    )


def _csv(separator: str = ",", head: str = HEADER, tail: str = "") -> str:
    body = [separator.join(map(str, row.values())) + tail for row in rows()]
    return "\n".join([head, *body]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        _csv(head=f"{HEADER},,", tail=",,"),  # empty columns behind the table, as spreadsheets write
        _csv(tail=",,"),
        _csv(head=f",{HEADER}").replace("\nq", "\n,q"),  # and before it
        _csv(", ", HEADER.replace(",", ", ")),
        _csv(", ", HEADER.replace(",", ", ")).replace("question 0", '"question 0"'),
    ],
)
def test_spaces_and_empty_cells_around_a_table(text: str, load) -> None:
    table = load("t.csv", text)
    is_that_table(table)
    assert table.queries()[0]["query"] == "question 0"


def test_a_cell_too_many_that_holds_something_is_a_bad_row(load) -> None:
    with pytest.raises(ValueError, match=r"6 wrong number of cells.*row 1: has 8 cells, the header has 7"):
        load("t.csv", _csv(tail=",x"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_its_mark(encoding: str, load) -> None:
    is_that_table(load("t.csv", _csv().encode(encoding)))


def test_a_mark_in_front_of_a_mark(load) -> None:
    is_that_table(load("t.csv", codecs.BOM_UTF8 * 2 + _csv().encode()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_csv().encode("utf-16-le"), r"t\.csv: its first line holds NUL bytes.*save it as UTF-8"),
        (_csv().encode("utf-16")[:-1], r"t\.csv: begins as utf-16 and is none at byte \d+; save it as UTF-8"),
    ],
)
def test_other_unicode_is_named(content: bytes, words: str, load) -> None:
    with pytest.raises(ValueError, match=words):
        load("t.csv", content)


def test_a_column_in_capitals_is_named(load) -> None:
    with pytest.raises(ValueError, match=r"do you mean 'QUERY_ID' for 'query_id' and 'QUERY' for 'query'"):
        load("t.csv", _csv(head=HEADER.upper()))


@pytest.mark.parametrize("tokens", [10**400, 10**18, "1e300", 1e300, float("inf")])
def test_a_count_beyond_reason_is_a_bad_row(tokens: Any) -> None:
    with pytest.raises(ValueError, match="it must be an integer from 0 to 1,000,000,000"):
        cells.count(tokens)


@pytest.mark.parametrize(
    ("value", "number"),
    [("0,5", 0.5), ("0,125", 0.125), ("1,25", 1.25), ("12,0", 12.0), (Decimal("0.25"), 0.25), ("1.25", 1.25)],
)
def test_numbers_as_spreadsheets_and_databases_write_them(value: Any, number: float) -> None:
    assert cells.number(value) == number


@pytest.mark.parametrize("value", ["1,234", "1,2,3", ",5", "1,", Decimal("NaN"), Decimal("-1")])
def test_what_may_be_two_numbers_is_none(value: Any) -> None:
    with pytest.raises(ValueError, match="it must be a number >= 0"):
        cells.number(value)


def test_counts_of_every_type() -> None:
    assert [cells.count(value) for value in (12, 12.0, "12", "12.0", Decimal(12), np.int64(12), "12,0")] == [12] * 7


@pytest.mark.parametrize(
    ("value", "golds"),
    [
        (["one", None], ("one",)),
        (str(np.array(["one", "two"])), ("one", "two")),  # what pandas writes to CSV: "['one' 'two']"
        (str(np.array(["it's", 'a "b"'])), ("it's", 'a "b"')),
        (str(np.array(["x" * 50, "y" * 50])), ("x" * 50, "y" * 50)),  # over two lines
        ("['one', 'two']", ("one", "two")),
        ("['one, two']", ("one, two",)),
        ("['one']", ("one",)),
        ("[1, 2]", ("1", "2")),
        (Decimal("1.5"), ("1.5",)),
    ],
)
def test_accepted_answers_as_they_are_written(value: Any, golds: tuple[str, ...]) -> None:
    assert cells.answers(value) == golds


@pytest.mark.parametrize("value", ["['one' 'two', 'three']", "[one]", "['one'", "[1 2]"])
def test_half_a_list_is_no_answer(value: str) -> None:
    if value.endswith("]"):
        with pytest.raises(ValueError, match="it looks like a list and is none"):
            cells.answers(value)
    else:
        assert cells.answers(value) == (value,)


def test_replies_that_are_numbers_read_as_in_csv(tmp_path: Path) -> None:
    (tmp_path / "catalogue.yaml").write_text(CATALOGUE)
    for reply, words in ((42, "42"), (4.5, "4.5"), (True, "True")):
        pd.DataFrame(rows(reply=reply)).to_parquet(tmp_path / "t.parquet")
        assert load_table(tmp_path / "t.parquet").lookup("q0", "a").reply == words
