"""Wide and score-only tables, tables of several files, and the same text twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from routers.data.catalogue import Member
from routers.data.table import ReplyTable, load_table, split_of

TOKENS = {"llama3:8b": Member("llama3:8b", "x", 1.0, 10.0), "b": Member("b", "x", 2.0, 20.0)}
PER_CALL = {name: Member(name, "x", 0.0, 0.0, price_request=usd) for name, usd in (("a", 0.25), ("b", 0.5))}
SCORES = [{"query": f"question {i}?", "a": i % 2, "b": 1.0} for i in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_scores_alone_and_a_price_per_call(tmp_path: Path, suffix: str) -> None:
    table = load_table(write(tmp_path / f"t{suffix}", SCORES), PER_CALL)
    assert table.queries()[2] == {
        "query_id": "3", "query": "question 2?", "family": "", "split": split_of("question 2?"),
    }  # fmt: skip
    np.testing.assert_array_equal(table.correct_matrix(), [[i % 2, 1.0] for i in range(8)])
    np.testing.assert_array_equal(table.cost_matrix(), [[0.25, 0.5]] * 8)
    assert not table.has_replies and table.max_cost == 0.5


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_all_that_a_wide_table_may_hold_is_what_the_long_one_holds(tmp_path: Path, suffix: str) -> None:
    wide, long = [], []
    for i in range(5):
        query = {
            "query_id": f"q{i}",
            "query": f"what is {i}",
            "family": "f",
            "split": "test",
            "gold": json.dumps([str(i)]),
        }
        of = {
            "llama3:8b": {
                "correct": i / 4,
                "reply": f"l{i}",
                "prompt_tokens": i,
                "completion_tokens": 3,
                "cost": None,
            },
            "b": {"correct": 1.0, "reply": "b, c", "prompt_tokens": 7, "completion_tokens": i, "cost": 0.5 + i},
        }
        names = {("b", "correct"): "b", ("llama3:8b", "correct"): "llama3:8b:correct"}
        cells = {names.get((m, k), f"{m}:{k}"): v for m, values in of.items() for k, v in values.items()}
        wide.append({**query, **cells})
        long += [{**query, "member": m, **values} for m, values in of.items()]
    found = load_table(write(tmp_path / f"t{suffix}", wide), TOKENS)
    expected = ReplyTable(long, TOKENS)
    assert found.queries() == expected.queries() and found.members == ["llama3:8b", "b"]
    for i in range(5):
        assert found.gold(f"q{i}") == expected.gold(f"q{i}") == (str(i),)
        assert all(found.lookup(f"q{i}", m) == expected.lookup(f"q{i}", m) for m in found.members)


def test_what_is_wrong_in_a_wide_table_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoilt = [dict(row) for row in SCORES]
    spoilt[3]["b"] = None
    with pytest.raises(ValueError, match=r"1 of 8 queries lack a row .*\(1 of b\), the first is query '4'"):
        ReplyTable(spoilt, PER_CALL)
    spoilt[5] |= {"a": 7, "notes": "x"}
    with caplog.at_level(logging.WARNING):
        table = ReplyTable(spoilt, PER_CALL, drop_incomplete=True, max_bad_share=0.1)
    assert table.incomplete == ["4", "6"] and "columns that are not used: notes" in caplog.text
    (entry,) = table.bad_rows
    assert entry["row"] == 6 and entry["detail"].startswith("member 'a': field 'correct' is 7; it must be a number")
    with pytest.raises(ValueError, match=r"prompt_tokens', 'completion_tokens' are missing.*price_request: USD"):
        ReplyTable(SCORES, {**PER_CALL, "b": TOKENS["b"]})
    with pytest.raises(ValueError, match=r"'member', 'correct'.* are missing.*one column of scores per member.*\(c, "):
        ReplyTable(SCORES, {"c": Member("c", "x", 0.0, 0.0)})
    with pytest.raises(ValueError, match="beside 'b:cost' there is no column 'b' or 'b:correct' of scores"):
        ReplyTable([{"query": "q", "a": 1, "b:cost": 2}], PER_CALL)
    with pytest.raises(ValueError, match="the columns 'a' and 'a:correct' hold the same scores"):
        ReplyTable([{"query": "q", "a": 1, "a:correct": 2}], PER_CALL)
    with pytest.raises(ValueError, match="'a:cost' may be the score of member 'a:cost' or the cost of member 'a'"):
        ReplyTable([{"query": "q", "a": 1, "a:cost": 1}], {**PER_CALL, "a:cost": Member("a:cost", "x", 0.0, 0.0)})


def test_the_first_of_one_text_stays_within_and_across_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    again = [{"query": "QUESTION  3", "a": 0, "b": 0.0}, {"query": "another", "a": 0, "b": 0.0}]
    paths = [write(tmp_path / "t.csv", SCORES), write(tmp_path / "u.parquet", again)]
    with caplog.at_level(logging.WARNING):
        table = load_table(paths, PER_CALL, quarantine_path=tmp_path / "bad.jsonl")
    assert table.repeated == {"9": "4"} and len(table) == 9 and not table.bad_rows  # outcomes may differ, and are kept
    assert table.lookup("4", "a").correct == 1.0 and table.queries()[-1]["query_id"] == "10"
    assert "an earlier query of their split has the same text: 1, such as '9' (of '4')" in caplog.text
    assert json.loads((tmp_path / "bad.jsonl").read_text())["reason"] == "repeated query"
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such table"):
        load_table([paths[0], tmp_path / "none.csv"], PER_CALL)
    half = [{**row, "b": None} if i == 3 else row for i, row in enumerate(SCORES)]
    assert "9" in {q["query_id"] for q in ReplyTable([*half, *again], PER_CALL, drop_incomplete=True).queries()}
