"""Tables as columns on disk: one copy for all processes, the same as from rows, never half, never stale."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routers.data import stored
from routers.data.billing import PriceTier, cost, costs
from routers.data.catalogue import Member
from routers.data.table import ReplyTable, load_table

PRICES = {name: Member(name, "x", 1.0 + j, 10.0) for j, name in enumerate("abc")}


def rows(count: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = [
        {"query_id": f"q{i}", "query": f"question {i}?", "member": m, "reply": f"{i}{m} \u2028", "gold": [str(i), "x"],
         "prompt_tokens": int(rng.integers(1, 99)), "completion_tokens": int(rng.integers(1, 99)),
         "correct": float(rng.random()), "seconds": float(rng.random()), "family": f"f{i % 3}"}
        for m in "abc" for i in range(count)
    ]  # fmt: skip
    made[5] |= {"correct": 7.0}
    return made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stored, "STORED_FROM", 0)
    return tmp_path / "home" / "srpo" / "tables"


def folders(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.is_dir())


def same(found: ReplyTable, expected: ReplyTable) -> bool:
    return (
        found.queries() == expected.queries()
        and found.bad_rows == expected.bad_rows
        and all(
            found.lookup(q["query_id"], m) == expected.lookup(q["query_id"], m)
            and found.gold(q["query_id"]) == expected.gold(q["query_id"])
            for q in expected.queries()
            for m in expected.members
        )
    )


def test_a_stored_table_is_the_table_of_its_rows_and_tells_its_bad_ones_each_time(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), path, row_group_size=7)
    expected = ReplyTable(rows(), PRICES, source=str(path))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = load_table(path, PRICES, quarantine_path=tmp_path / "bad.jsonl")
        assert same(table, expected) and "1 of 120 rows" in caplog.text and "1 of 40 queries are left" in caplog.text
        assert [json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [6, None]
        with pytest.raises(ValueError, match=r"1 of 120 rows of .* are bad"):
            load_table(path, PRICES, max_bad_share=0.0)
    assert len(folders(home)) == 1
    matrix = table.correct_matrix()
    matrix[:] = 0.0  # a copy: what is mapped stays
    assert table.correct_matrix().any()


def test_another_file_or_another_price_is_another_table(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows()[6:] if r["query_id"] != "q5"))
    first = load_table(path, PRICES, drop_incomplete=True)
    dearer = load_table(path, {**PRICES, "a": Member("a", "x", 2.0, 20.0)}, drop_incomplete=True)
    np.testing.assert_allclose(dearer.cost_matrix()[:, 0], 2 * first.cost_matrix()[:, 0])
    np.testing.assert_array_equal(dearer.cost_matrix()[:, 1:], first.cost_matrix()[:, 1:])
    path.write_text(path.read_text().replace("question 7?", "question seven?"))
    assert "question seven?" in {q["query"] for q in load_table(path, PRICES, drop_incomplete=True).queries()}
    assert len(folders(home)) == 3


LOAD = """
import sys
from routers.data import stored
from routers.data.catalogue import Member
from routers.data.table import load_table
stored.STORED_FROM, checks, check = 0, [], stored.check
stored.check = lambda *given: (checks.append(1), check(*given))[1]
table = load_table(sys.argv[1], {n: Member(n, "x", 1.0 + j, 10.0) for j, n in enumerate("abc")})
print(len(checks), round(float(table.cost_matrix().sum()), 12), table.lookup("q3", "b").reply.strip())
"""


def test_processes_that_start_together_make_one_copy_and_a_killed_one_leaves_none(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows(2000)), path)
    run = [sys.executable, "-c", LOAD, str(path)]
    started = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[0].split() for process in started]
    assert sorted(line[0] for line in told) == ["0", "0", "1"] and len({tuple(line[1:]) for line in told}) == 1
    (folder,) = folders(home)
    draft = folder.rename(folder.with_suffix(".draft"))  # as a process leaves it that was killed
    (draft / "table.json").unlink()
    again = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert again == ["1", *told[0][1:]] and folders(home) == [folder]


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), path)
    home.parent.parent.write_text("a file where a folder should be")
    assert same(load_table(path, PRICES), ReplyTable(rows(), PRICES, source=str(path)))
    assert "columns cannot be stored" in caplog.text


def test_many_replies_cost_what_each_costs() -> None:
    member = Member(
        "m", "x", 1.0, 10.0, price_request=0.5, price_tiers=(PriceTier(9, 3.0, 30.0), PriceTier(4, 2.0, 20.0))
    )
    prompt, completion = np.array([0, 4, 5, 9, 10, 50]), np.array([1, 0, 7, 7, 7, 3])
    assert costs(member, prompt, completion).tolist() == [
        cost(member, int(p), int(c)) for p, c in zip(prompt, completion, strict=True)
    ]
