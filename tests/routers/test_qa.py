"""Question sets: rows from disk, the draw, and errors that name file, row and field."""

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from routers.data.questions import SETS, load_qa, without_duplicates

DATA = Path(os.environ.get("SRPO_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data")) / "qa"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_both_spellings_of_the_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"query": "who? \u2028 them", "gold": ["a", "  ", "b"], "type": "x"},
        {"id": "7", "question": "when", "golden_answers": ["1999"], "metadata": {}},
    )
    assert load_qa(path) == [
        {"query_id": "mine-1", "query": "who? \u2028 them", "gold": ["a", "b"], "family": "mine", "split": "train"},
        {"query_id": "mine-2", "query": "when", "gold": ["1999"], "family": "mine", "split": "train"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json\n", r"bad\.jsonl: row 2: is not JSON"),
        ([1], r"bad\.jsonl: row 2: is list, not an object"),
        ({"gold": ["a"]}, r"row 2: field 'query' \(or 'question'\) is missing; there are \['gold'\]"),
        ({"query": " ", "gold": ["a"]}, r"row 2: field 'query' is ' '"),
        ({"question": [3], "gold": ["a"]}, r"row 2: field 'question' is \[3\]"),
        ({"question": "x\ud835", "gold": ["a"]}, r"row 2: field 'question' is .*not valid Unicode"),
        ({"query": "q"}, r"row 2: field 'gold' \(or 'golden_answers'\) is missing"),
        ({"query": "q", "gold": {"a": 1}}, r"row 2: field 'gold' is \{'a': 1\}; it must be a text or a list"),
        ({"query": "q", "golden_answers": [None]}, r"row 2: field 'golden_answers' is \[None\]"),
        ({"query": "q", "gold": ["", " "]}, r"row 2: field 'gold' holds no answer"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"query": "fine", "gold": ["a"]}, row)
    with pytest.raises(ValueError, match=message):
        load_qa(path)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such question set"):
        load_qa(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"neither a file nor one of nq, triviaqa"):
        load_qa("squad")
    path = write(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: there are no rows"):
        load_qa(path)
    with pytest.raises(ValueError, match="limit is 0"):
        load_qa(path, limit=0)
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        load_qa(path, "test")


@pytest.mark.parametrize("suffix", ["jsonl", "JSONL.gz", "json", "csv", "tsv", "parquet"])
def test_fifty_bad_questions_of_a_thousand_are_left_out_in_every_format(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [{"question": f"q{i}?", "gold": '["1", "one"]'} for i in range(1000)]
    for i in range(0, 1000, 20):
        rows[i] = [{"question": "", "gold": "a"}, {"question": "q", "gold": ""}][i % 40 // 20]
    path = tmp_path / f"my.set.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif "json" in suffix.lower():
        text = json.dumps(rows) if suffix == "json" else "\n\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode("utf-8-sig"))
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if suffix == "tsv" else ";", encoding="utf-8-sig")
    found = load_qa(path, quarantine_path=tmp_path / "bad.jsonl")
    assert [row["query"] for row in found] == [row["question"] for i, row in enumerate(rows) if i % 20]
    assert {row["family"] for row in found} == {"my.set"} and found[0]["gold"] == ["1", "one"]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 50
    with pytest.raises(ValueError, match=r"50 of 1000 .*at most 0\.04"):
        load_qa(path, max_bad_share=0.04)


def test_the_draw_is_seeded_sorted_and_without_replacement(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", *({"query": f"q{i}", "gold": ["a"]} for i in range(50)))
    first, again, other = (load_qa(path, limit=20, seed=seed) for seed in (42, 42, 43))
    assert first == again and first != other
    numbers = [int(row["query_id"].split("-")[1]) for row in first]
    assert numbers == sorted(set(numbers)) and len(numbers) == 20
    assert load_qa(path, limit=99) == load_qa(path)


def test_a_test_question_is_never_trained_on() -> None:
    rows = [{"query": q} for q in ("Who wrote X?", "who wrote  x", "Where?", "WHEN")]
    assert [r["query"] for r in without_duplicates(rows)] == ["Who wrote X?", "Where?", "WHEN"]
    tested = [{"query": "who wrote x ?"}, {"query": "when?"}]
    assert [r["query"] for r in without_duplicates(rows, tested)] == ["Where?"]


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data (or SRPO_DATA_DIR) is not here")
def test_the_development_files_load() -> None:
    files = {path.stem: path for path in DATA.glob("*.jsonl")}
    expected = {
        "nq_open_dev": 3610, "triviaqa": 1000, "popqa": 1000, "bamboogle": 125, "hotpotqa_dev": 7405,
        "2wiki_dev": 12576, "musique_dev": 2417, "musique_train": 19938,
    }  # fmt: skip
    assert {name: len(load_qa(path)) for name, path in files.items()} == expected
    assert len(SETS) == 7
