"""Each published set, as its official place has it: files of the same form, typed here by hand.

Where a form was seen is said in the converter's docstring.
"""

import json
from pathlib import Path

import pandas
import pytest

from routers.data.converters import convert
from routers.data.table import load_table, replies_of


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


def test_routerbench_as_its_frame_is(tmp_path):
    frame = pandas.DataFrame(
        {
            "sample_id": ["m.0", "m.1", "p.0"],
            "prompt": ["['Solve it.', '2+2?']", "['3*3?']", "Write [a] 'haiku'"],
            "eval_name": ["math", "math", "prose"],
            "mistralai/mixtral-8x7b-chat": [1.0, 0.0, 0.25],
            "gpt-4-1106-preview": [1.0, 1.0, 0.5],
            "mistralai/mixtral-8x7b-chat|model_response": ["['4']", "['8']", "['Old pond']"],
            "gpt-4-1106-preview|model_response": ["['4']", "['9']", '["It\'s old"]'],
            "mistralai/mixtral-8x7b-chat|total_cost": [1e-5, 1e-5, 2e-5],
            "gpt-4-1106-preview|total_cost": [1e-3, 1e-3, 2e-3],
            "oracle_model_to_route_to": ["mistralai/mixtral-8x7b-chat", "gpt-4-1106-preview", "gpt-4-1106-preview"],
        }
    )
    write(tmp_path / "routerbench_0shot.parquet", frame)
    table = convert("routerbench", tmp_path).table()
    assert [(q["query"], q["family"]) for q in table.queries()] == [
        ("Solve it.\n2+2?", "math"), ("3*3?", "math"), ("Write [a] 'haiku'", "prose"),
    ]  # fmt: skip
    assert table.members == ["mistralai/mixtral-8x7b-chat", "gpt-4-1106-preview"]
    assert table.correct_matrix().tolist() == [[1, 1], [0, 1], [0.25, 0.5]]
    assert table.cost_matrix().tolist() == [[1e-5, 1e-3], [1e-5, 1e-3], [2e-5, 2e-3]]
    assert table.lookup("routerbench-00003", "gpt-4-1106-preview").reply == "It's old"
    with pytest.raises(ValueError, match=r"pickles are not read.*read_pickle\('routerbench_0shot\.pkl'\)"):
        convert("routerbench", tmp_path / "routerbench_0shot.pkl")


def test_wide_tables_of_other_names(tmp_path):
    frame = pandas.DataFrame({"question": ["one", "two"], "answer": [4, 5], "task": "t", "split": ["train", "dev"]})
    frame = frame.assign(small=[1, 0], small_cost=[0.1, 0.2], large=[True, False], large_cost=[1.0, 2.0])
    path = write(tmp_path / "mine.csv", frame.assign(question_cost=3))  # of no member
    table = convert("wide", path).table()
    assert (table.members, table.has_replies) == (["small", "large"], False)
    assert [(q["split"], table.gold(q["query_id"])) for q in table.queries()] == [
        ("train", ("4",)),
        ("heldout", ("5",)),
    ]
    assert table.cost_matrix().tolist() == [[0.1, 1.0], [0.2, 2.0]]
    write(path, frame.assign(large_cost=[1.0, None]))  # a cost that is missing is no cost of 0
    with pytest.raises(ValueError, match=r"mine\.csv: row 2: cost of large is ''; it must be a number from 0 to 1000"):
        convert("wide", path)
    write(path, frame.drop(columns=["small_cost", "large_cost"]))
    with pytest.raises(ValueError, match=r"row 1: no column NAME:cost, .* or NAME_cost is beside a column NAME"):
        convert("wide", path)


def test_sprout_as_published(tmp_path):
    def rows(*texts):
        told = {"score": 0.5, "num_input_tokens": 100, "num_output_tokens": 10, "response": "r"}
        return pandas.DataFrame(
            [{"key": text, "dataset": "d", "dataset_level": None, "dataset_idx": 0, "prompt": text,
              "golden_answer": "g", "openai-gpt-4o": told, "wxai-llama-3-2-1b-instruct": {**told, "score": 1.0}}
             for text in texts]
        )  # fmt: skip

    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows("one"))
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows("two"))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows("three", "ONE"))
    table = convert("sprout", tmp_path).table()
    assert [q["query"] for q in table.queries("train")] == ["one", "two"]
    assert [q["query"] for q in table.queries("heldout")] == ["three"]
    with pytest.raises(FileNotFoundError, match=r"parquet: is one file; give the folder that holds the parts.*SPROUT"):
        convert("sprout", tmp_path / "data" / "test-00000-of-00001.parquet")
    costs = [(100 * 2.5 + 10 * 10) / 1e6, (100 * 0.06 + 10 * 0.06) / 1e6]
    assert table.cost_matrix("heldout").tolist() == [pytest.approx(costs)]
    assert table.correct_matrix("heldout").tolist() == [[0.5, 1.0]]


def test_embedllm_as_published(tmp_path):
    def part(*prompts):
        return pandas.DataFrame(
            [{"prompt_id": number, "model_id": m, "model_name": f"org__m{m}", "category": "mathqa", "category_id": 1,
              "label": int(m == 1), "prompt": prompt} for m in (0, 1) for number, prompt in enumerate(prompts)]
        )  # fmt: skip

    for name, prompts in {"train": ("one", "two"), "val": ("three",), "test": ("four", "Two!")}.items():
        write(tmp_path / f"{name}.csv", part(*prompts))
    write(tmp_path / "question_order.csv", "prompt_id,prompt\n0,one\n")
    converted = convert("embedllm", tmp_path)
    table = converted.table()
    assert [(q["query"], q["split"]) for q in table.queries()] == [
        ("one", "train"), ("two", "train"), ("three", "train"), ("four", "heldout"),
    ]  # fmt: skip
    assert table.members == ["org__m0", "org__m1"] and table.correct_matrix().tolist() == [[0, 1]] * 4
    assert table.cost_matrix().max() == 0 and table.max_cost == 1.0 and not table.has_replies
    assert [one["reason"] for one in converted.dropped] == ["repeated text"]  # once, not once per model
    converted.write(tmp_path / "out" / "table.parquet")
    prices = (tmp_path / "out" / "catalogue.yaml").read_text()
    (tmp_path / "out" / "catalogue.yaml").write_text(prices.replace("price_out: 0.0", "price_out: 10.0"))
    assert load_table(tmp_path / "out" / "table.parquet").max_cost == pytest.approx(128 * 10 / 1e6)  # as is promised


def test_routereval_as_its_docstring_saves_it(tmp_path):
    found = {
        "model": ["org__a", "org__b"],
        "prompt": {"train_prompt": ["one", "two"], "val_prompt": ["three"], "test_prompt": ["four"]},
        "data": {"train_score": [[1, 0], [0.5, 1]], "val_score": [[1, 1]], "test_score": [[0, 1]]},
    }
    path = write(tmp_path / "gsm8k_router_dataset.json", found)
    table = convert("routereval", path).table()
    assert [(q["split"], q["family"]) for q in table.queries()] == [("train", "gsm8k")] * 3 + [("heldout", "gsm8k")]
    assert table.correct_matrix().tolist() == [[1, 0], [0.5, 1], [1, 1], [0, 1]]
    write(path, {**found, "model": ["org__a"]})
    with pytest.raises(ValueError, match=r"gsm8k_router_dataset\.json: train_score is not 2 prompts x 1 models"):
        convert("routereval", path)
    del found["prompt"]["val_prompt"]
    with pytest.raises(ValueError, match=r"json: is not a mapping of model, .*field 'val_prompt' is missing"):
        convert("routereval", write(path, found))


def test_llmrouterbench_as_published(tmp_path):
    def result(dataset, model, scores, **more):
        records = [
            {"index": i, "origin_query": f"{dataset} {i}", "prompt": f"Question: {dataset} {i}", "prediction": "4",
             "ground_truth": "4", "score": score, "prompt_tokens": 15, "completion_tokens": 5, "cost": 0.001,
             "raw_output": f"{model} says 4"} for i, score in enumerate(scores)
        ]  # fmt: skip
        head = {"performance": 0.5, "time_taken": 1.0, "prompt_tokens": 15, "completion_tokens": 5, "cost": 0.1,
                "counts": 2, "dataset_name": dataset, "split": "test", "model_name": model, "demo": False}  # fmt: skip
        return {**head, **more, "records": records}

    bench = tmp_path / "results" / "bench"
    for model in ("a", "b"):
        write(bench / "aime" / "test" / model / f"aime-{model}-20250101_000000.json", result("aime", model, [0, 0]))
        write(bench / "aime" / "test" / model / f"aime-{model}-20250102_000000.json", result("aime", model, [1, 0]))
    write(bench / "hle" / "test" / "c" / "hle-c-20250101_000000.json", result("hle", "c", [1]))
    demo = result("aime", "d", [1, 1], demo=True)
    write(bench / "aime" / "test" / "d" / "aime-d-20250101_000000.json", demo)
    converted = convert("llmrouterbench", tmp_path)
    table = converted.table()
    assert [(q["query"], q["family"]) for q in table.queries()] == [
        ("Question: aime 0", "aime"), ("Question: aime 1", "aime"),
    ]  # fmt: skip
    assert table.correct_matrix().tolist() == [[1, 1], [0, 0]]  # of the newest files
    found = table.lookup(table.queries()[0]["query_id"], "b")
    assert (found.reply, found.cost, found.prompt_tokens) == ("b says 4", 0.001, 15)
    assert {one["reason"]: one["detail"] for one in converted.dropped} == {
        "demo": str(bench / "aime" / "test" / "d" / "aime-d-20250101_000000.json"),
        "no reply of every member": "none of a, b to: Question: hle 0",
        "member outside the pool": "c",
    }
    assert convert("llmrouterbench", bench, ["c"]).table().members == ["c"]
    write(bench / "hle" / "test" / "c" / "hle-c-20250103_000000.json", {"records": []})
    with pytest.raises(
        ValueError, match=r"hle-c-20250103_000000\.json: is not a result of LLMRouterBench \(field 'dataset_name'"
    ):
        convert("llmrouterbench", tmp_path)


def test_routerarena_is_held_out_and_never_trained_on(tmp_path):
    def asked(model, accuracy, index="AIME_12", **more):
        result = {"generated_answer": f"by {model}", "success": True, "error": None,
                  "token_usage": {"input_tokens": 20, "output_tokens": 4, "total_tokens": 24}}  # fmt: skip
        return {"global index": index, "prompt": f"Please solve {index}", "prediction": model,
                "generated_result": result, "cost": 2e-5, "accuracy": accuracy, **more}  # fmt: skip

    folder = tmp_path / "router_inference" / "predictions"
    write(
        folder / "one.json",
        [asked("a", 1.0), asked("a", 0.0, "Ethics_justice_3"), asked("b", 1.0, for_optimality=True)],
    )
    write(folder / "two.json", [asked("b", 1.0), asked("b", 0.5, "Ethics_justice_3"), asked("c", None)])
    write(folder / "one-robustness.json", [asked("a", None, "AIME_1")])
    converted = convert("routerarena", tmp_path)
    table = converted.table()
    assert [(q["split"], q["family"]) for q in table.queries()] == [("heldout", "AIME"), ("heldout", "Ethics_justice")]
    assert table.correct_matrix().tolist() == [[1, 1], [0, 0.5]] and table.cost_matrix().tolist() == [[2e-5] * 2] * 2
    assert [one["reason"] for one in converted.dropped] == ["repeated reply", "not evaluated"]
    path = tmp_path / "out" / "table.parquet"
    converted.write(path)
    assert len(load_table(path)) == 2  # to evaluate on
    with pytest.raises(
        ValueError, match=r"table\.parquet: routerarena is for evaluation only, and nothing is trained on"
    ):
        replies_of(str(path), None, max_bad_share=0, drop_incomplete=False, folder=tmp_path)


def test_bfcl_as_its_command_leaves_it(tmp_path):
    turns = [["q0"], ["q1"], ["then", "now"]]
    system = {"role": "system", "content": "s"}
    questions = [
        {"id": f"simple_python_{i}", "question": [[system, {"role": "user", "content": text}] for text in texts]}
        for i, texts in enumerate(turns)
    ]
    write(tmp_path / "data" / "BFCL_v9_simple_python.json", "".join(json.dumps(q) + "\n" for q in questions))
    for model, wrong in {"org_a": [1], "org_b": []}.items():
        results = [
            {"id": f"simple_python_{i}", "result": "[f(x=1)]" if i < 2 else [[["f"]]],
             "input_token_count": 7 if i < 2 else [[3, 4], [5]], "output_token_count": 2, "latency": 0.5}
            for i in range(3)
        ]  # fmt: skip
        head = {"accuracy": 1 - len(wrong) / 3, "correct_count": 3 - len(wrong), "total_count": 3}
        failed = [{"id": f"simple_python_{i}", "valid": False, "error": ["no"], "prompt": {}} for i in wrong]
        for kind, lines in (("result", results), ("score", [head, *failed])):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write(tmp_path / kind / model / "non_live" / f"BFCL_v9_simple_python_{kind}.json", text)
    write(tmp_path / "result" / "org_c" / "BFCL_v9_simple_python_result.json", "{}\n")
    converted = convert("bfcl", tmp_path)
    table = converted.table()
    assert [(q["query"], q["family"]) for q in table.queries()] == [
        ("q0", "simple_python"), ("q1", "simple_python"), ("then\nnow", "simple_python"),
    ]  # fmt: skip
    assert table.members == ["org_a", "org_b"] and table.correct_matrix().tolist() == [[1, 1], [0, 1], [1, 1]]
    found = table.lookup("bfcl-00003", "org_a")
    assert (found.prompt_tokens, found.completion_tokens, found.seconds, found.reply) == (12, 2, 0.5, '[[["f"]]]')
    assert [one["reason"] for one in converted.dropped] == ["not evaluated"]
    score = tmp_path / "score" / "org_a" / "non_live" / "BFCL_v9_simple_python_score.json"
    write(score, score.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"simple_python_score\.json: its first line counts 1 failures, and 0 follow"):
        convert("bfcl", tmp_path)
