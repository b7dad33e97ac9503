"""Each published set, as its official place has it: files of the same form, typed here by hand.

Where a form was seen is said in the converter's docstring.
"""

import json
from pathlib import Path

import pandas
import pytest

from routers.data.converters import convert


def write(path: Path, content) -> Path:
    """A DataFrame as its suffix says, JSON lines (a list), JSON (a dict) or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pandas.DataFrame):
        content.to_parquet(path) if path.suffix == ".parquet" else content.to_csv(path, index=False)
    elif isinstance(content, list) and path.suffix != ".json":
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_routellm_mmlu_as_published(tmp_path):
    columns = "prompt,mistralai/Mixtral-8x7B-Instruct-v0.1,gpt-4-1106-preview\n"
    write(tmp_path / "responses" / "mmlu_anatomy.csv", columns + '"Which bone?\nA. one\nAnswer:",True,False\n')
    write(tmp_path / "responses" / "mmlu_astronomy.csv", columns + "Which star?,False,True\n")
    table = convert("routellm_mmlu", tmp_path).table()
    assert [(q["query"], q["family"]) for q in table.queries()] == [
        ("Which bone?\nA. one\nAnswer:", "anatomy"), ("Which star?", "astronomy"),
    ]  # fmt: skip
    assert table.members == ["mixtral-8x7b-instruct-v0.1", "gpt-4-1106-preview"]
    assert table.correct_matrix().tolist() == [[1, 0], [0, 1]]


def test_routellm_gsm8k_as_published(tmp_path):
    weak, strong = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
    frame = pandas.DataFrame({"prompt": ["1 + 1?"], weak: [False], strong: [True]})
    replies = {f"{weak}_response": ["3"], f"{strong}_response": ["It is 2"]}
    write(tmp_path / "gsm8k_responses.csv", frame.assign(**replies))
    write(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}])
    table = convert("routellm_gsm8k", tmp_path).table()
    [query] = table.queries()
    assert table.gold(query["query_id"]) == ("2",)
    found = table.lookup(query["query_id"], strong)
    assert (found.reply, found.correct, found.cost) == ("It is 2", 1.0, pytest.approx((2 * 10 + 2 * 30) / 1e6))


def test_gsm8k_4models_as_published(tmp_path):
    names = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    solutions = {name: {"is_correct": name.startswith("175b"), "solution": f"by {name}\nA: 2"} for name in names}
    line = {"question": "1 + 1?", "ground_truth": "It is 2\nA: 2", **solutions}
    write(tmp_path / "data" / "example_model_solutions.jsonl", [line])
    table = convert("gsm8k_4models", tmp_path).table()
    [query] = table.queries()
    assert table.gold(query["query_id"]) == ("2",) and table.correct_matrix().tolist() == [[0, 0, 1, 1]]
    assert table.lookup(query["query_id"], "6b_finetuning").reply == "by 6b_finetuning\nA: 2"


def _long(query, member, score, **more):
    return {"task_name": "t", "query": query, "ground_truth": "g", "metric": "f1_score", "choices": None,
            "model_name": member, "response": f"r {member}", "performance": score, "embedding_id": 0,
            "token_num": 13, "input_tokens": 10, "output_tokens": 3, "response_time": 1.5, **more}  # fmt: skip


@pytest.mark.parametrize("name", ["llmrouter", "xroutebench"])
def test_one_row_per_query_and_model_as_published(tmp_path, name):
    train = [_long(text, member, 0.5) for text in ("one", "two") for member in ("a", "b")]
    test = [_long(text, member, 1.0) for text in ("One?", "new") for member in ("a", "b")]  # "One?" leaks
    if name == "llmrouter":
        write(tmp_path / "routing_data" / "default_routing_train_data.jsonl", train)
        write(tmp_path / "routing_data" / "default_routing_test_data.jsonl", test)
        prices = {m: {"size": "7B", "feature": f"is {m}", "input_price": 1.0, "output_price": 2.0} for m in "abc"}
        write(tmp_path / "llm_candidates" / "default_llm.json", prices)
    else:
        write(tmp_path / "llmrouter_generic" / "train.parquet", pandas.DataFrame(train))
        write(tmp_path / "llmrouter_generic" / "test.parquet", pandas.DataFrame(test))
        write(tmp_path / "llmrouter_generic_queries" / "train.parquet", pandas.DataFrame({"query": ["one"]}))
        write(tmp_path / "personalized" / "train.parquet", pandas.DataFrame({"model_1": ["a"]}))
        pool = [{"model_name": m, "size": "7B", "input_price_per_1m": 1.0, "output_price_per_1m": 2.0, "service": "s",
                 "api_model_id": m, "description": f"is {m}"} for m in "abc"]  # fmt: skip
        write(tmp_path / "llm_candidates" / "train.parquet", pandas.DataFrame(pool))
    converted = convert(name, tmp_path)
    table = converted.table()
    assert [q["query"] for q in table.queries("train")] == ["one", "two"]
    assert [q["query"] for q in table.queries("heldout")] == ["new"]
    assert {one["reason"] for one in converted.dropped} == {"repeated text"}
    found = table.lookup(table.queries("heldout")[0]["query_id"], "b")
    assert (found.reply, found.seconds, found.correct, found.cost) == ("r b", 1.5, 1.0, pytest.approx(16e-6))
    assert table.catalogue["a"].descriptor == "is a"
