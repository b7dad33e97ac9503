"""`srpo record` against a real server on loopback: its table, what a second start asks and pays, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, OpenAIServer

from routers.data.table import load_table, split_of
from routers.pool import record

QUERIES = [
    {"query": "What is 2 + 2?", "gold": "4", "family": "sums"},
    {"query": "Capital of Z\u00fcrich's country?", "gold": ["Bern", "Berne"], "query_id": "bern"},
    {"query": "what is 2 + 2", "gold": "4"},  # the first one again
    {"question": "Name the colour of snow.", "golden_answers": ["white"], "split": "test"},
]
ASKED = [0, 1, 3]


def answer(request: dict[str, Any]) -> str:
    """`strong` knows all, `weak` says 4."""
    query = request["messages"][-1]["content"]
    known = {"What": "4", "Capi": "Berne", "Name": "The White!"}
    return known[query[:4]] if request["model"] == "big/strong" else "4"


@pytest.fixture
def server():
    with OpenAIServer(answer=answer) as running:
        yield running


@pytest.fixture
def given(tmp_path: Path, server: OpenAIServer) -> list[str]:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(query) + "\n" for query in QUERIES))
    strong = "name: strong, descriptor: knows all, price_in: 1000, price_out: 4000, model: big/strong"
    weak = "name: weak, descriptor: counts, price_in: 100, price_out: 400, max_tokens: 64, concurrency: 1"
    members = [f"  - {{{one}, base_url: {server.url}}}\n" for one in (strong, weak)]
    (tmp_path / "pool.yaml").write_text("members:\n" + "".join(members))
    files = {"catalogue": "pool.yaml", "queries": "q.jsonl", "output": "table.parquet"}
    return [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]


def test_it_asks_once_and_writes_the_table(
    given: list[str], server: OpenAIServer, tmp_path: Path, capsys: Any
) -> None:
    assert record.main(given) == 0
    said = capsys.readouterr().out
    assert len(server.requests) == 6
    assert "1 queries repeat the text of another one and are left out" in said
    assert "3 queries x 2 members = 6 calls; 0 are there" in said
    # bounds of weak: 128 + the bytes of each query in, 64 out, at 100 and 400 USD per million
    bound = (3 * 128 + sum(len(_text(QUERIES[i]).encode()) for i in ASKED) + 4 * 3 * 64) / 1e4
    assert f"weak: 3 calls, about 16 + at most 192 tokens, at most ${bound:.4f}" in said
    assert f"srpo train quickstart/own_pool --table {tmp_path}/table.parquet --catalogue {tmp_path}/pool.yaml" in said
    assert "6/6 calls, 0 failed, " in said and "\r" not in said

    table = load_table(tmp_path / "table.parquet", tmp_path / "pool.yaml")
    assert [q["query_id"] for q in table.queries()] == ["q-1", "bern", "q-4"]
    assert [q["split"] for q in table.queries()] == [
        split_of(_text(QUERIES[0])),
        split_of(_text(QUERIES[1])),
        "heldout",
    ]
    assert table.correct_matrix().tolist() == [[1, 1], [1, 0], [1, 0]]
    assert table.gold("bern") == ("Bern", "Berne")
    words = len(_text(QUERIES[0]).split())
    assert table.lookup("q-1", "strong").cost == pytest.approx((10 * words + 40 * 1) / 1e4)
    asked = server.requests[0]["messages"]
    assert [m["role"] for m in asked] == ["user"] and asked[0]["content"] in [_text(q) for q in QUERIES], "and no more"


def _text(query: dict[str, Any]) -> str:
    return query.get("query") or query["question"]


def test_a_second_start_pays_for_what_is_missing(
    given: list[str], server: OpenAIServer, tmp_path: Path, capsys: Any
) -> None:
    server.always = Fault(status=400, billed=True)
    server.faults = [Fault(), Fault.retry_after_seconds(0.1), Fault(status=500)]  # tried again; the rest fails
    assert record.main(given) == 1
    said = capsys.readouterr().out
    assert "calls failed (" in said and "bad request); the last: bad request: status 400" in said
    assert "--drop_incomplete true" in said
    spent = json.loads((tmp_path / "table.replies" / "spending.json").read_text())["spent"]
    assert spent > 0
    there = len(list((tmp_path / "table.replies").glob("*/*.json")))
    assert there == 1

    before, server.always = len(server.requests), Fault()
    assert record.main(given) == 0
    assert len(server.requests) - before == 6 - there, "the one that came is not asked again, what failed is"
    again = json.loads((tmp_path / "table.replies" / "spending.json").read_text())
    used = [again["run"][name] for name in ("prompt_tokens", "completion_tokens")]
    assert used == [sum(tokens) for tokens in zip(*server.usage, strict=True)], "failed calls are billed, and kept"
    assert again["spent"] > spent
    before = len(server.requests)
    assert record.main([*given, "--grade", "f1"]) == 0, "another grade"
    assert record.main([*given, "--grade", "none"]) == 0
    assert len(server.requests) == before, "costs nothing"
    assert "fill the column 'correct'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="missing correct"):
        load_table(tmp_path / "table.parquet", tmp_path / "pool.yaml")


def test_the_cap_holds_over_all_starts(given: list[str], server: OpenAIServer, capsys: Any) -> None:
    cap = ["--max_cost_usd", "0.0001"]
    assert record.main([*given, *cap]) == 1
    assert server.requests == [], "no call's bound fits"
    said = capsys.readouterr().out
    assert "leaves no room for 6 calls: raise --max_cost_usd" in said and "nothing was answered" in said
    # Room for one bound of strong at a time: calls wait for what others have set aside, and all are made.
    bound = (10 * (128 + 40) + 40 * 512) / 1e4
    assert record.main([*given, "--max_cost_usd", f"{bound + 0.3}"]) == 0
    capsys.readouterr()
    assert record.main([*given, "--max_cost_usd", f"{bound + 0.3}"]) == 0
    assert "0 are there" not in capsys.readouterr().out


def test_a_member_that_is_out_of_money_is_left_alone(
    given: list[str], server: OpenAIServer, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(record, "SECONDS_OF_REST", 0.01)
    server.always = Fault(status=402)
    assert record.main(given) == 1
    said = capsys.readouterr().out
    assert "no quota" in said and "calls were not made, for their members failed" in said
    assert sum(r["model"] == "weak" for r in server.requests) == 1, "one place at once, and then nobody asks"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "x"}, r"q.jsonl: row 1: field 'gold' \(or 'golden_answers'\) is missing"),
        ({"query": "x", "gold": []}, "row 1: field 'gold' holds no answer"),
        ({"gold": "x"}, r"row 1: field 'query' \(or 'question'\) is missing"),
        ({"query": "x", "gold": "y", "split": "sometimes"}, "row 1: field 'split' is 'sometimes'; it must be train"),
    ],
)
def test_bad_queries_are_named(row: dict[str, Any], message: str, given: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        record.main(given)
    assert not (tmp_path / "table.replies").exists(), "nothing was made"


def test_what_is_refused(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": "x", "gold": "many"}) + "\n")
    with pytest.raises(ValueError, match=r"none of its accepted answers .* states a number"):
        record.main([*given, "--grade", "numeric"])
    (tmp_path / "table.parquet").write_text("somebody's")
    with pytest.raises(ValueError, match=r"table\.parquet is there, and was not recorded here"):
        record.main(given)
    assert (tmp_path / "table.parquet").read_text() == "somebody's"
    with pytest.raises(ValueError, match=r"write the name of a \.parquet file"):
        record.main([*given, "--output", str(tmp_path / "x.csv")])


def test_ctrl_c_keeps_what_came(given: list[str], server: OpenAIServer, tmp_path: Path) -> None:
    server.always = Fault(hang=True)
    server.faults = [Fault(), Fault()]
    script = "import sys\nfrom routers.pool.record import main\nsys.exit(main())"
    run = subprocess.Popen([sys.executable, "-c", script, *given], stdout=subprocess.PIPE, text=True, env=os.environ)
    end = time.monotonic() + 120
    while len(server.requests) < 4 and time.monotonic() < end:  # two answered, the others hang
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "stopped; what came is kept in" in said
    server.always, before = Fault(), len(server.requests)
    assert record.main(given) == 0
    assert len(server.requests) - before == 4
