"""Tables as users have them: every format, spelling and kind of bad row, with the right values."""

import csv
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routers.data.catalogue import Member
from routers.data.table import ReplyTable, load_table, split_of
from routers.pool import recorded_pool
from routers.tasks.think_route.sft_rows import restricted
from srpo.quarantine import BadRows

PRICES = {"a": Member("a", "x", 1.0, 10.0), "b": Member("b", "x", 2.0, 20.0)}
FORMATS = (
    "parquet",
    "jsonl",
    "json",
    "csv",
    "tsv",
    "jsonl.gz",
    "json.gz",
    "csv.gz",
    "tsv.gz",
    "csv.xz",
    "JSONL",
    "CSV",
)


def row(i: int, member: str, **changes: Any) -> dict[str, Any]:
    base = {"query_id": f"q{i}", "query": f"question {i}?", "member": member, "reply": f'caf\xe9 {i}\u2028, "x"\nend'}
    return {**base, "prompt_tokens": 5, "completion_tokens": 3, "correct": 1.0, **changes}


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [row(i, member) for i in range(count) for member in "ab"]


def write(folder: Path, suffix: str, made: list[dict[str, Any]], encoding: str = "utf-8", **how: Any) -> Path:
    path, kind = folder / f"table.{suffix}", suffix.lower()
    if kind.startswith("parquet"):
        pd.DataFrame([{k: None if v is None else str(v) for k, v in r.items()} for r in made]).to_parquet(path)
        return path
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(r) + how.get("end", "\n") for r in made)
    elif kind.startswith("json"):
        text = json.dumps(made)
    else:
        with (folder / "draft").open("w", encoding="utf-8", newline="") as file:
            columns = list(dict.fromkeys(name for r in made for name in r))
            separator = how.get("separator", "\t" if kind.startswith("tsv") else ",")
            writer = csv.DictWriter(file, columns, delimiter=separator)
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in r.items()} for r in made)
        text = (folder / "draft").read_bytes().decode("utf-8") + how.get("last", "")
    data = text.encode(encoding)
    packers = {"gz": gzip.compress, "xz": lzma.compress}
    path.write_bytes(packers[kind.split(".")[-1]](data) if kind.split(".")[-1] in packers else data)
    return path


def same(found: ReplyTable, expected: ReplyTable) -> bool:
    pairs = [(q["query_id"], m) for q in expected.queries() for m in expected.members]
    return (
        found.queries() == expected.queries()
        and found.members == expected.members
        and all(found.lookup(*pair) == expected.lookup(*pair) for pair in pairs)
        and all(found.gold(q["query_id"]) == expected.gold(q["query_id"]) for q in expected.queries())
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    assert same(load_table(write(tmp_path, suffix, rows()), PRICES), ReplyTable(rows(), PRICES))


@pytest.mark.parametrize("suffix", FORMATS)
def test_fifty_bad_rows_of_a_thousand_are_left_out_with_their_reasons(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = rows(500)
    spoils: list[tuple[str, dict[str, Any]]] = [
        ("missing query_id", {"query_id": None}), ("missing query", {"query": " "}),
        ("missing member", {"member": None}),
        ("bad prompt_tokens", {"prompt_tokens": "many"}), ("bad completion_tokens", {"completion_tokens": -1}),
        ("missing correct", {"correct": None}), ("bad correct", {"correct": 100}),
        ("member without a price", {"member": "gpt-4o"}), ("contradicts an earlier row", {"query": "another text"}),
        ("bad split", {"split": "part 7"}),
    ]  # fmt: skip
    expected = {}
    for k, (reason, changes) in enumerate(spoils):
        for j in range(5):
            index = 1 + 2 * (9 * k + 90 * j)  # rows of member b: the first row of a query stays
            made[index] |= changes
            expected[index + 1] = reason
    assert len(expected) == 50
    path = write(tmp_path, suffix, made)
    with caplog.at_level(logging.WARNING):
        table = load_table(path, PRICES, quarantine_path=tmp_path / "bad.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {e["row"]: e["reason"] for e in entries if e["reason"] != "incomplete query"} == expected
    assert len(table) == 450 and len(table.incomplete) == 50 == len(table.bad_rows)
    assert "50 of 1000 rows" in caplog.text and "50 of 500 queries are left out" in caplog.text
    with pytest.raises(BadRows, match=r"50 of 1000 .*at most 0\.049 of them may be \(max_bad_share\)"):
        load_table(path, PRICES, max_bad_share=0.049)


def test_rows_that_are_no_rows_do_not_take_others_with_them(tmp_path: Path) -> None:
    lines = [json.dumps(r) for r in rows(40)]
    lines[3], lines[11], lines[20] = "{broken", "[1]", lines[20][:-1] + ', "correct": 0}'
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n \n")
    table = load_table(tmp_path / "t.jsonl", PRICES, max_bad_share=0.1)
    assert [(e["row"], e["reason"]) for e in table.bad_rows] == [(4, "not JSON"), (12, "no mapping"), (21, "not JSON")]
    assert table.incomplete == ["q1", "q5", "q10"] and len(table) == 37

    text = write(tmp_path, "csv", [{**r, "reply": "r"} for r in rows(40)]).read_text().splitlines()
    text[4], text[12] = text[4] + ",9", text[12].rsplit(",", 1)[0]
    text[21] = text[21].replace(",r,", ',"r,')  # a quote that never closes
    (tmp_path / "t.csv").write_text("\n".join(text))
    table = load_table(tmp_path / "t.csv", PRICES, max_bad_share=0.1)
    wrong = "wrong number of cells"
    assert [(e["row"], e["reason"]) for e in table.bad_rows] == [(4, wrong), (12, wrong), (21, "broken quotes")]
    assert table.incomplete == ["q1", "q5", "q10"] and len(table) == 37


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        ("jsonl", {"encoding": "utf-8-sig"}), ("csv", {"encoding": "utf-8-sig"}), ("tsv", {"encoding": "utf-16"}),
        ("jsonl", {"end": "\n\n"}), ("jsonl", {"end": "\r\n"}), ("csv", {"separator": ";"}),
        ("csv", {"separator": "\t"}),
        ("csv", {"last": "\n\n,,,,,,\n"}), ("json", {"encoding": "utf-8-sig"}),
    ],
)  # fmt: skip
def test_files_as_editors_and_excel_write_them(tmp_path: Path, suffix: str, how: dict[str, Any]) -> None:
    assert same(load_table(write(tmp_path, suffix, rows(), **how), PRICES), ReplyTable(rows(), PRICES))


def test_the_other_shapes_of_json(tmp_path: Path) -> None:
    made, path = rows(), tmp_path / "t.json"
    columns = {name: [r[name] for r in made] for name in made[0]}
    for text in ("\n".join(map(json.dumps, made)), json.dumps({"data": made}), json.dumps(columns)):
        path.write_text(text)
        assert same(load_table(path, PRICES), ReplyTable(made, PRICES))


SPELLED: list[tuple[dict[str, Any], str, Any]] = [
    ({"prompt_tokens": 12.0}, "prompt_tokens", 12), ({"prompt_tokens": "12.0"}, "prompt_tokens", 12),
    ({"correct": True}, "correct", 1.0), ({"correct": "FALSE"}, "correct", 0.0), ({"correct": "0.5"}, "correct", 0.5),
    ({"correct": 1}, "correct", 1.0), ({"seconds": ""}, "seconds", 0.0), ({"seconds": None}, "seconds", 0.0),
    ({"seconds": float("nan")}, "seconds", 0.0), ({"seconds": "1.5"}, "seconds", 1.5), ({"reply": ""}, "reply", ""),
    ({"gold": ""}, "gold", ()), ({"gold": None}, "gold", ()), ({"gold": "3"}, "gold", ("3",)),
    ({"gold": [3, 4.0, "x"]}, "gold", ("3", "4", "x")), ({"gold": '["a", "b, c"]'}, "gold", ("a", "b, c")),
    ({"gold": "['a', 'b']"}, "gold", ("a", "b")), ({"gold": 3.0}, "gold", ("3",)), ({"family": None}, "family", ""),
    ({"family": 7}, "family", "7"), ({"split": "test"}, "split", "heldout"), ({"split": "Train"}, "split", "train"),
    ({"split": "validation"}, "split", "heldout"), ({"split": None}, "split", split_of("question 0?")),
    ({"split": ""}, "split", split_of("question 0?")), ({"query_id": 17}, "query_id", "17"),
    ({"query_id": 17.0}, "query_id", "17"), ({"query_id": " q7 "}, "query_id", "q7"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "value"), SPELLED)
def test_spellings_of_values(changes: dict[str, Any], field: str, value: Any) -> None:
    table = ReplyTable([row(0, "a", **changes), row(0, "b", **changes)], PRICES)
    query = table.queries()[0]
    found = {**query, **vars(table.lookup(query["query_id"], "a")), "gold": table.gold(query["query_id"])}
    assert found[field] == value and type(found[field]) is type(value)


def test_parquet_of_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame([row(0, "a", seconds=1.0, gold=["x"], prompt_tokens=5.0), row(0, "b", gold=["x"])])
    frame.astype({"member": "category"}).to_parquet(tmp_path / "t.parquet")
    table = load_table(tmp_path / "t.parquet", PRICES)
    assert (table.lookup("q0", "a").seconds, table.lookup("q0", "b").seconds, table.gold("q0")) == (1.0, 0.0, ("x",))
    pq.write_table(pa.table({"query_id": [1]}), tmp_path / "u.parquet")
    with pytest.raises(
        ValueError, match="columns 'query', 'member', 'correct', 'prompt_tokens', 'completion_tokens' are"
    ):
        load_table(tmp_path / "u.parquet", PRICES)
    (tmp_path / "v.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"v\.parquet: cannot be read as parquet"):
        load_table(tmp_path / "v.parquet", PRICES)


def test_a_reply_of_200_000_characters(tmp_path: Path) -> None:
    path = write(tmp_path, "csv", [row(0, "a", reply="z" * 200_000), row(0, "b")])
    assert len(load_table(path, PRICES).lookup("q0", "a").reply) == 200_000


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_latin_1_is_named_with_file_and_byte(tmp_path: Path, suffix: str) -> None:
    text = write(tmp_path, suffix, [row(0, "a", reply="cafX"), row(0, "b", reply="r")]).read_bytes()
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes(text.replace(b"X", b"\xe9"))
    where = text.index(b"X")
    with pytest.raises(ValueError, match=rf"latin\.{suffix}: row 1: byte 0xE9 is not UTF-8 .*byte {where}, in line"):
        load_table(path, PRICES)


def test_columns_that_are_missing_or_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    renamed = [
        {("Correct " if k == "correct" else "model" if k == "member" else k): v for k, v in r.items()} for r in rows()
    ]
    with pytest.raises(ValueError, match=r"columns 'member', 'correct' are missing; there are .*mean 'Correct '"):
        ReplyTable(renamed, PRICES)
    with caplog.at_level(logging.WARNING):
        ReplyTable([{**r, "latency_ms": 5, "extra": "x"} for r in rows()], PRICES)
    assert "columns that are not used: latency_ms, extra" in caplog.text
    twice = write(tmp_path, "csv", rows()).read_text().replace("query_id,query,", "query_id,query_id,", 1)
    (tmp_path / "twice.csv").write_text(twice)
    with pytest.raises(ValueError, match=r"twice\.csv: the column 'query_id' stands twice"):
        load_table(tmp_path / "twice.csv", PRICES)


def test_queries_without_a_row_of_some_member(caplog: pytest.LogCaptureFixture) -> None:
    uneven = [r for r in rows() if (r["query_id"], r["member"]) not in (("q3", "b"), ("q5", "a"))]
    with pytest.raises(ValueError, match=r"2 of 8 queries lack .*\(1 of b, 1 of a\).*'q3'.*drop_incomplete: true"):
        ReplyTable(uneven, PRICES)
    with caplog.at_level(logging.WARNING):
        table = ReplyTable(uneven, PRICES, drop_incomplete=True)
    assert table.incomplete == ["q3", "q5"] and len(table) == 6
    with pytest.raises(BadRows, match=r"1 of 14 .*1 bad correct.*2 of 8 queries lack"):  # both in one run
        ReplyTable([{**uneven[0], "correct": 7}, *uneven[1:]], PRICES)
    assert "2 of 8 queries are left out" in caplog.text


def test_a_member_of_the_catalogue_without_a_row_is_named(caplog: pytest.LogCaptureFixture) -> None:
    table = ReplyTable([r for r in rows() if r["member"] != "b"], PRICES, "mine.csv")
    assert table.members == [name for name in PRICES if name != "b"]
    assert "mine.csv: not in the pool, for no row is theirs: b" in caplog.text


def test_repeated_rows_keep_the_first() -> None:
    table = ReplyTable([*rows(20), row(3, "b", correct=0.0)], PRICES)
    assert table.lookup("q3", "b").correct == 1.0 and len(table) == 20 and table.bad_rows[0]["row"] == 41


def test_a_training_query_that_is_held_out_too_is_left_out() -> None:
    made = [{**r, "split": "train"} for r in rows(50)]
    made += [row(60, m, query="QUESTION 4", split="test") for m in "ab"]
    table = ReplyTable(made, PRICES)
    assert "q4" not in {q["query_id"] for q in table.queries()} and len(table.queries("heldout")) == 1
    assert [e["row"] for e in table.bad_rows] == [9, 10]


def test_columns_that_nothing_needs_may_be_absent() -> None:
    bare = [{k: v for k, v in r.items() if k != "reply"} for r in rows()]
    table = ReplyTable(bare, PRICES)
    assert not table.has_replies and table.lookup("q0", "a").reply == "" and not restricted(table, ["b"]).has_replies
    with pytest.raises(ValueError, match="the table has no column 'reply'"):
        recorded_pool(table)
    tokenless = [{k: v for k, v in r.items() if "tokens" not in k} for r in rows()]
    assert ReplyTable([{**r, "cost": 0.5} for r in tokenless], PRICES).lookup("q0", "a").cost == 0.5
    assert ReplyTable(tokenless, {m: Member(m, "x", 0.0, 0.0) for m in "ab"}).lookup("q0", "a").cost == 0.0
    with pytest.raises(ValueError, match="columns 'prompt_tokens', 'completion_tokens' are missing"):
        ReplyTable(tokenless, PRICES)
    with pytest.raises(BadRows, match=r"no row can be used.*field 'prompt_tokens' is None"):
        ReplyTable([{**r, "cost": None} for r in tokenless], PRICES)


def test_what_is_here_or_names_a_file_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or {"train": rows()})
    monkeypatch.chdir(tmp_path)
    Path("user").mkdir()
    Path("notes.txt").write_text("x")
    Path("plain").write_text("x")
    for missing in (
        "none.parquet",
        "none.jsonl.gz",
        "none.xlsx",
        "./none",
        "a/b/c",
        "user/replies",
        "~/none",
        "/none",
    ):
        with pytest.raises(FileNotFoundError, match="no such table"):
            load_table(missing, PRICES)
    for unknown in ("notes.txt", "plain"):
        with pytest.raises(ValueError, match=r"its name says no format; there are \.parquet"):
            load_table(unknown, PRICES)
    with pytest.raises(ValueError, match="this folder holds no"):
        load_table("user", PRICES)
    assert not asked
    write(tmp_path / "user", "jsonl", rows(2))
    write(tmp_path / "user", "csv", rows(9)[4:])
    assert len(load_table("user", PRICES)) == 9
    assert len(load_table("someone/replies-v1.5", PRICES)) == 8 and asked == ["someone/replies-v1.5"]


def test_the_hubs_own_splits_count_where_there_is_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    made = rows()
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": made[:12], "test": made[12:]})
    table = load_table("user/replies", PRICES)
    assert [q["split"] for q in table.queries()] == ["train"] * 6 + ["heldout"] * 2

    def offline(name: str) -> None:
        raise ConnectionError("cannot reach it\nat all")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"is no file here, and cannot be read from the Hub \(ConnectionError"):
        load_table("user/replies", PRICES)


def test_broken_archives_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl.gz", rows())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"table\.jsonl\.gz: is not a whole \.gz file"):
        load_table(path, PRICES)
