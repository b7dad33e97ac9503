"""Converters of public routing sets: on small files made here, and on the real ones where they are present."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from routers.data.converters import CONVERTERS, SOURCES, UNKNOWN_REPLY_TOKENS, convert, estimated_tokens

DATA = Path(os.environ.get("SRPO_DATA_DIR", Path(__file__).resolve().parents[3] / "shared" / "data"))
real = pytest.mark.skipif(
    not (DATA / "routellm").is_dir(), reason=f"public data sets are not at {DATA}; set SRPO_DATA_DIR to use them"
)


def write_jsonl(path: Path, items: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def test_every_set_has_a_source():
    assert list(SOURCES) == list(CONVERTERS)


def test_unknown_name_and_absent_data(tmp_path):
    with pytest.raises(ValueError, match="no data set 'mmlu'; known are routellm_mmlu"):
        convert("mmlu", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mmlu\.jsonl.*lm-sys/RouteLLM"):
        convert("routellm_mmlu", tmp_path)


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
    assert len(converted.rows) == 2
    assert converted.rows[1] == converted.rows[0] | {"member": "gpt-4-1106-preview", "correct": 1.0}
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
@pytest.mark.parametrize("name", CONVERTERS)
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
