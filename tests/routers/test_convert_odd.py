"""`srpo convert` on sources that are not as their set has them: one sentence or a count, and what is written loads."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from routers.data.converters import convert
from routers.data.converters.command import main
from routers.data.table import load_table

WIDE = {"query": [f"question {i}" for i in range(20)], "A": 1.0, "A|cost": 0.1, "B": 0.0, "B|cost": 0.2}
PRICES = {
    "m1": {"feature": "one\nline", "input_price": 1, "output_price": 2},
    "m2": {"input_price": 0, "output_price": 0},
}
ROW = {"task": "t", "gold": "B", "metric": "em_mc", "score": {"m1": 1, "m2": 0}}
HEAD = {"accuracy": 1.0, "correct_count": 1, "total_count": 1}
ASKED = {"id": "simple_0", "question": [[{"role": "user", "content": "q"}]]}
EVAL = {"model": ["a", "b"], "prompt": {f"{part}_prompt": ["q"] for part in ("train", "val", "test")}}
EVAL |= {"data": {f"{part}_score": [[1, 0]] for part in ("train", "val", "test")}}


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Files of these names: a text as it is, a list as JSON lines, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            "".join(json.dumps(one) + "\n" for one in content) if isinstance(content, list) else json.dumps(content)
        )
        path.write_text(content if isinstance(content, str) else lines)
    return folder


def llmrouter(prices: Any) -> dict[str, Any]:
    rows = [{**ROW, "query": f"q{i}"} for i in range(20)]
    return {"train.jsonl": rows, "test_dedup.jsonl": [], "default_llm.json": prices}


def bfcl(score: Any = (HEAD,), asked: Any = (ASKED,)) -> dict[str, Any]:
    return {
        "result/m/BFCL_v4_simple_result.json": json.dumps({"id": "simple_0", "result": "x"}),
        "score/m/BFCL_v4_simple_score.json": [*score],
        "data/BFCL_v4_simple.json": [*asked],
    }


BENCH = {"dataset_name": "d", "split": "s", "model_name": "m", "demo": False}
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "two files": ("gsm8k_4models", {"a/test_4models.jsonl": [], "b/test_4models.jsonl": []}, "2 such files"),
    "gold": (
        "routellm_gsm8k",
        {"gsm8k_responses.csv": "prompt\nq\n", "test.jsonl": "garbage"},
        r"test\.jsonl: is not lines of question and answer",
    ),
    "prices": ("llmrouter", llmrouter({"m1": 3}), r"default_llm\.json: is not models with their feature"),
    "a price that is null": ("llmrouter", llmrouter({"m1": {"input_price": None}}), "input_price of 'm1' is None"),
    "half a price": ("llmrouter", llmrouter({"m1": {"input_price": 1}}), "field 'output_price_per_1m' is missing"),
    "a price per token": (
        "llmrouter",
        llmrouter({"m1": {"input_price": 1e-7, "output_price": 1}}),
        "llmrouter's price list: member 'm1': field 'price_in' .*looks like a price per token",
    ),
    "nothing in it": ("llmrouter", llmrouter(PRICES) | {"train.jsonl": []}, "no reply was read; left out: nothing"),
    "records": ("llmrouterbench", {"bench/d/s/m/t.json": BENCH | {"records": None}}, "is not a result of LLMR"),
    "scores in one row": (
        "routereval",
        {"x.json": EVAL | {"data": {f"{p}_score": [1] for p in ("train", "val", "test")}}},
        "no len",
    ),
    "one model twice": ("routereval", {"x.json": EVAL | {"model": ["a", "a"]}}, "the model 'a' is listed twice"),
    "no JSON": ("routereval", {"x.json": ""}, r"x\.json: is not a mapping of model, prompt"),
    "a pickle": ("routereval", {"gsm8k_router_dataset.pkl": ""}, "pkl: pickles are not read.*save it as JSON, by"),
    "no header": ("bfcl", bfcl(score=()), r"simple_score\.json: is not a line of correct_count"),
    "counts": ("bfcl", bfcl(score=({"accuracy": 1},)), "field 'total_count' is missing"),
    "a question": (
        "bfcl",
        bfcl(asked=({**ASKED, "question": "text"},)),
        "simple.json: is not lines of id and question",
    ),
    "not evaluated": ("bfcl", bfcl() | {"score/m/BFCL_v4_simple_score.json": "{"}, "is not JSON lines"),
    "a split": ("wide", {"t.csv": "query,A,A|cost,split\nq,1,.1,banana\n"}, "split is 'banana'; it must be train"),
    "a name": (
        "wide",
        {"t.jsonl": [{"query": "q", "a\nb": 1, "a\nb|cost": 0.1}]},
        "field 'name' is 'a.nb'; write one",
    ),
    "USD": ("wide", {"t.csv": "query,A,A|cost\nq,1,2000\n"}, "cost of A is '2000'; it must be a number from"),
}


@pytest.mark.parametrize("name", ODD)
def test_one_sentence_names_what_is_odd(name: str, tmp_path: Path) -> None:
    data_set, files, said = ODD[name]
    with pytest.raises(ValueError, match=said) as found:
        convert(data_set, put(tmp_path, files))
    assert found.traceback[-1].path.is_relative_to(Path(__file__).parents[2]), "it is raised by us, so in our words"


def frame(tmp_path: Path, **columns: Any) -> Path:
    pandas.DataFrame(WIDE | columns).to_parquet(path := tmp_path / "t.parquet")
    return path


def test_what_is_not_taken_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    converted = convert("wide", frame(tmp_path, C=1.0, A=[None, *[1.0] * 19]))  # C has no cost, A no first score
    assert converted.table().members == ["A", "B"] and "columns that are not used: C" in caplog.text
    assert "left out: 1 no score, 1 no reply of every member" in converted.summary()
    rows = put(tmp_path / "l", llmrouter({"m1": PRICES["m1"]}))
    found = convert("llmrouter", rows)
    assert "no price is known of m2, so it counts as free" in caplog.text
    assert found.catalogue["m1"].descriptor == "one line"
    assert load_table(found.write(tmp_path / "out" / "t.parquet")[0]).members == ["m1", "m2"]


def test_replies_without_a_text_are_counted_and_load(tmp_path: Path) -> None:
    found = convert(
        "routerbench", frame(tmp_path, **{"A|model_response": [None, *["x"] * 19], "B|model_response": "y"})
    )
    assert "; 1 replies were published without a text, which is empty here" in found.summary()
    assert len(load_table(found.write(tmp_path / "out" / "t.parquet")[0])) == 20


def test_a_text_that_looks_like_a_list_is_an_answer(tmp_path: Path) -> None:
    table = convert("wide", frame(tmp_path, gold="[a, b)]")).table()
    assert table.gold(table.queries()[0]["query_id"]) == ("[a, b)]",)


@pytest.mark.parametrize("words", [["c,d,B"], ["c,d", "B"], ["B, c,d"], ["B", "B", "c,d"], ["c,d"]])
def test_members_are_named_alone_or_with_commas(words: list[str], tmp_path: Path) -> None:
    source = frame(tmp_path, **{"c,d": 1.0, "c,d|cost": 0.5})
    if words == ["c,d,B"] or words == ["B, c,d"]:
        with pytest.raises(ValueError, match=r"wide has no member 'c'; it has A, B, c,d"):
            convert("wide", source, words)
    else:
        assert convert("wide", source, words).table().members == [name for name in ("B", "c,d") if name in words]


def test_no_member_is_taken_for_another_that_is_named_twice(tmp_path: Path) -> None:
    assert convert("wide", frame(tmp_path), ["A,A"]).table().members == ["A"]


def test_two_prompts_under_one_id_are_two_queries(tmp_path: Path) -> None:
    rows = [{"prompt_id": 0, "prompt": f"q{i}", "model_name": m, "label": i % 2} for m in "ab" for i in range(5)]
    for part in ("train", "val", "test"):
        pandas.DataFrame(rows if part == "train" else rows[:0]).to_csv(tmp_path / f"{part}.csv", index=False)
    table = convert("embedllm", tmp_path).table()
    assert table.correct_matrix().tolist() == [[i % 2] * 2 for i in range(5)]


def test_the_source_is_never_written_over(tmp_path: Path) -> None:
    path = frame(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the source itself: name another file"):
        main(["wide", str(path), "--output", str(path)])
    assert path.read_bytes() == before
    pandas.DataFrame(WIDE).iloc[:, :1].to_csv(odd := tmp_path / "odd.csv", index=False)
    with pytest.raises(ValueError, match="no column NAME:cost"):
        main(["wide", str(odd), "--output", str(tmp_path / "o" / "t.parquet"), "--max_bad_share", "0.5"])
