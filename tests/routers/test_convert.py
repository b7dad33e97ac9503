"""`srpo convert`: what all sets share, on small files made here, and the real sets where they are present."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from routers.data.converters import SETS, build, convert
from routers.data.converters.build import UNKNOWN_REPLY_TOKENS, TableBuilder, entries, estimated_tokens
from routers.data.converters.command import main
from routers.data.files import Row
from routers.data.table import load_table

DATA = Path(os.environ.get("SRPO_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))
real = pytest.mark.skipif(
    not (DATA / "routellm").is_dir(), reason=f"public data sets are not at {DATA}; set SRPO_DATA_DIR to use them"
)


def write_jsonl(path: Path, items: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def test_unknown_name_absent_data_and_pickles(tmp_path):
    with pytest.raises(ValueError, match="no data set 'mmlu'; known are routellm_mmlu"):
        convert("mmlu", tmp_path)
    for source in (tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(FileNotFoundError, match=r"download routellm_mmlu from github\.com/lm-sys/RouteLLM"):
            convert("routellm_mmlu", source)
    with pytest.raises(ValueError, match=r"pickles are not read.*read_pickle\('a\.pkl'\)\.to_parquet\('a\.parquet'\)"):
        convert("routellm_mmlu", tmp_path / "a.pkl")


def test_estimated_tokens():
    assert [estimated_tokens(text) for text in ("", "abcd", "abcde")] == [1, 1, 2]


def test_routellm_mmlu_by_hand(tmp_path):
    correct = {"mixtral-8x7b-instruct-v0.1": False, "gpt-4-1106-preview": True}
    items = [
        {"task": "mmlu", "subject": "law", "query": "twelve chars", "correct": correct},
        {"task": "mmlu", "subject": "law", "query": "Twelve  chars?", "correct": correct},  # the same text again
    ]
    write_jsonl(tmp_path / "routellm" / "mmlu.jsonl", items)
    converted = convert("routellm_mmlu", tmp_path)
    first, second = converted.rows()
    assert second == first | {"member": "gpt-4-1106-preview", "correct": 1.0}
    assert "reply" not in first and not converted.table().has_replies  # none was published
    assert [(one["reason"], one["row"]) for one in converted.dropped] == [("repeated text", 2)]
    table = converted.table()
    # 12 characters are 3 prompt tokens at 10 USD, one completion token at 30 USD per million
    assert table.lookup("routellm_mmlu-00001", "gpt-4-1106-preview").cost == pytest.approx(60e-6)


def test_llmrouter_by_hand(tmp_path):
    def item(query, metric):
        return {"task": "t", "query": query, "gold": "B", "metric": metric, "choices": None, "score": {"m": 0.5}}

    write_jsonl(tmp_path / "llmrouter" / "train.jsonl", [item("choose", "em_mc"), item("say", "f1_score")])
    write_jsonl(tmp_path / "llmrouter" / "test_dedup.jsonl", [item("CHOOSE?", "em_mc"), item("new", "f1_score")])
    prices = {"m": {"feature": "a model", "input_price": 0.2, "output_price": 0.4}, "unused": {}}
    (tmp_path / "llmrouter" / "default_llm.json").write_text(json.dumps(prices))
    table = convert("llmrouter", tmp_path).table()
    assert [(query["query"], query["split"]) for query in table.queries()] == [
        ("choose", "train"),
        ("say", "train"),
        ("new", "heldout"),  # the test copy of a training query is dropped
    ]
    assert table.catalogue["m"].descriptor == "a model"
    assert [table.lookup(q["query_id"], "m").completion_tokens for q in table.queries("train")] == [
        1,
        UNKNOWN_REPLY_TOKENS,
    ]


def test_entries_of_another_form_are_left_out_with_their_reasons(tmp_path, caplog):
    correct = {"mixtral-8x7b-instruct-v0.1": False, "gpt-4-1106-preview": True}
    items = [{"subject": "law", "query": f"question {i}", "correct": dict(correct)} for i in range(100)]
    del items[3]["query"]
    items[7]["correct"]["gpt-4-1106-preview"] = None
    items[9] = [1]
    write_jsonl(tmp_path / "routellm" / "mmlu.jsonl", items)
    with caplog.at_level("WARNING"):
        table = convert("routellm_mmlu", tmp_path).table()
    assert len(table) == 97 and "3 of 100 rows" in caplog.text and "row 4: field 'query' is missing" in caplog.text
    write_jsonl(tmp_path / "routellm" / "mmlu.jsonl", items[:10])
    with pytest.raises(ValueError, match=r"3 of 10 rows of .*mmlu\.jsonl are bad"):
        convert("routellm_mmlu", tmp_path)


def test_routeprofile_drops_the_broken_tasks(tmp_path):
    def item(task, query):
        result = {"response": "r", "prompt_tokens": 7, "completion_tokens": 3, "task_performance": 1.0}
        return {"task_name": task, "query": query, "ground_truth": "g", "model_performance": {"m": result}}

    folder = tmp_path / "routeprofile"
    folder.mkdir()
    items = [item("mbpp", "code"), item("gsm8k", "sum"), item("human_eval", "more code")]
    (folder / "routing_test_data.json").write_text(json.dumps(items))
    (folder / "candidate_models.json").write_text(
        json.dumps({"m": {"feature": "f", "input_price": 1.0, "output_price": 2.0}})
    )
    table = convert("routeprofile", tmp_path).table()
    assert [query["query"] for query in table.queries()] == ["sum"]
    recorded = table.lookup(table.queries()[0]["query_id"], "m")
    assert (recorded.prompt_tokens, recorded.completion_tokens, recorded.reply) == (7, 3, "r")
    assert recorded.cost == pytest.approx(13e-6)


def test_what_fails_leaves_nothing_behind():
    table = TableBuilder("made")

    def add(item):
        number = table.query(item["text"], key=item.get("key"))
        for member, score in item["scores"].items():
            table.reply(number, member, score)

    items = [
        {"text": "one", "scores": {"a": 1, "b": 2}},  # b has no score from 0 to 1, and a is undone with it
        {"text": "one", "scores": {"a": 1, "b": 0}},  # so this text is new
        {"text": "two", "key": 2, "scores": {"a": 0}},
        {"text": "two", "key": 2, "scores": {"b": 1, "a": 1}},  # the reply of a came before
        {"text": "three", "scores": {"a": 1}},
        {"text": "Two ", "key": 4, "scores": {"c": 1}},  # and so did this text
        *({"text": f"more {i}", "scores": {"a": 1, "b": 1}} for i in range(20)),
    ]
    table.add_all("file", [Row(n, item) for n, item in enumerate(items, 1)], add, "rows")
    converted = table.finish()
    assert [(r["query"], r["member"], r["correct"]) for r in converted.rows()[:4]] == [
        ("one", "a", 1), ("one", "b", 0), ("two", "a", 0), ("two", "b", 1),
    ]  # fmt: skip
    assert [(one["reason"], one["row"]) for one in converted.dropped] == [
        ("repeated reply", 4), ("repeated text", 6), ("another form", 1), ("no reply of every member", None),
    ]  # fmt: skip
    assert converted.dropped[-1]["detail"] == "none of b to: three"
    assert converted.summary().startswith("kept 22 queries (")


def test_the_pool_is_the_one_that_keeps_most_replies_or_the_one_asked_for():
    def built():
        table = TableBuilder("made")
        pools = ["ab"] * 5 + ["abcd"] * 3 + ["cdef"] * 2  # ab: 8 queries, 16 replies; abcd: 12; cdef: 8
        for number, pool in enumerate(pools):
            for member in pool:
                table.reply(
                    table.query(f"text {number}", key=number), member, 1, **({"cost": 0.5} if member in "cd" else {})
                )
        return table

    converted = built().finish()
    assert (list(converted.catalogue), len(converted.table())) == (["a", "b"], 8)
    assert [one["detail"] for one in converted.dropped[-4:]] == ["c", "d", "e", "f"]
    asked = built().finish(["d", "c"])
    assert (list(asked.catalogue), len(asked.table())) == (["c", "d"], 5)
    assert asked.table().lookup("made-00006", "c").cost == 0.5
    # a member whose replies all have a cost needs no price; one without any is free until somebody writes a price
    assert (asked.catalogue["c"].price_in, converted.catalogue["a"].price_in) == (None, 0.0)
    with pytest.raises(ValueError, match="made has no member 'z'; it has a, b, c, d, e, f"):
        built().finish(["z"])
    with pytest.raises(ValueError, match=r"made: no query has a reply of every member \(a, e\)"):
        built().finish(["a", "e"])


def test_large_files_are_read_row_by_row(tmp_path, monkeypatch):
    import pandas

    frame = pandas.DataFrame({"prompt": ['a "quoted"\nline, two', "b"], "score": [0.5, 1.0]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for path in sorted(tmp_path.iterdir()):
        whole = list(entries(path))
        with monkeypatch.context() as patch:
            patch.setattr(build, "_AT_ONCE", 0)
            assert list(entries(path)) == whole, path
            assert [row.value["prompt"] for row in whole] == list(frame["prompt"])


def test_the_command_writes_a_table_that_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "_BATCH", 2)  # several batches, in memory and on disk
    correct = {"mixtral-8x7b-instruct-v0.1": False, "gpt-4-1106-preview": True}
    items = [{"subject": "law", "query": f"question {i % 11}", "correct": correct} for i in range(12)]
    write_jsonl(tmp_path / "mmlu.jsonl", items)
    path = tmp_path / "out" / "table.parquet"
    main(["routellm_mmlu", str(tmp_path), "--output", str(path)])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("routellm_mmlu: kept 11 queries (") and told[0].endswith(
        "x 2 members; left out: 1 repeated text; prices: list prices of 2023, from memory"
    )
    assert told[1:] == [str(path), str(path.with_name("catalogue.yaml")), str(path.with_name("table.quarantine.txt"))]
    table, before = load_table(path), convert("routellm_mmlu", tmp_path).table()
    assert table.queries() == before.queries() and table.catalogue == before.catalogue
    assert np.array_equal(table.cost_matrix(), before.cost_matrix()) and table.cost_matrix().min() > 0
    [line] = path.with_name("table.quarantine.txt").read_text().splitlines()
    assert json.loads(line) == {"file": "mmlu.jsonl", "row": 12, "reason": "repeated text", "detail": "question 0"}
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    main(["routellm_mmlu", str(tmp_path), "--output", str(path)])  # again: the same
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files
    prices = path.with_name("catalogue.yaml")
    prices.write_text(prices.read_text() + "# checked against the bill\n")
    with pytest.raises(ValueError, match=r"catalogue\.yaml is there and says something else"):
        main(["routellm_mmlu", str(tmp_path), "--output", str(path.with_name("second.parquet"))])
    assert not path.with_name("second.parquet").exists() and prices.read_text().endswith("bill\n")
    with pytest.raises(ValueError, match="give NAME, SOURCE and --output"):
        main(["routellm_mmlu"])
    main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed and one.source in listed for name, one in SETS.items())


# From the README beside the data: queries, members, best single and oracle accuracy, on all rows or those held out.
EXPECTED = {
    "routellm_mmlu": (10489, 2, None, 0.81, 0.86),
    "routellm_gsm8k": (1319, 2, None, 0.857, 0.929),
    "llmrouter": (5989, 9, "heldout", 0.597, 0.750),
    "llmrouter_nq6": (500, 6, None, 0.457, 0.595),
    "routeprofile": (500, 8, None, 0.731, 0.853),
    "gsm8k_4models": (1319, 4, None, 0.563, None),
}


@real
@pytest.mark.parametrize("name", EXPECTED)
def test_real_sets(name):
    queries, members, split, best, oracle = EXPECTED[name]
    table = convert(name, DATA).table()
    correct = table.correct_matrix(split)
    assert (len(table), len(table.members)) == (queries, members)
    assert correct.mean(axis=0).max() == pytest.approx(best, abs=0.006)
    if oracle is not None:
        assert correct.max(axis=1).mean() == pytest.approx(oracle, abs=0.009)
    assert np.all(table.cost_matrix() > 0)
    assert set(Counter(query["split"] for query in table.queries())) == {"train", "heldout"}
