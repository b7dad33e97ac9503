"""What the training scripts do with bad rows: left out with reasons, up to a share that the recipe sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from routers.data.table import replies_of
from routers.evaluation.answers import gold_problem
from routers.tasks.think_route.arguments import ThinkRouteArguments
from routers.tasks.think_route.world import load_questions, load_replies
from srpo.quarantine import BadRows
from srpo.task import RunArguments

MEMBER = "  - {name: %s, descriptor: d, price_in: 1, price_out: 2}\n"
PRICES = f"members:\n{MEMBER % 'a'}{MEMBER % 'b'}"


def table(folder: Path, count: int = 100, **changes: Any) -> str:
    base = {"reply": "r", "prompt_tokens": 5, "completion_tokens": 3, "correct": 1, "gold": "3"}
    rows = [{**base, "query_id": i, "query": f"question {i}", "member": m} for i in range(count) for m in "ab"]
    for key, value in changes.items():
        rows[int(key[1:])] |= value
    (folder / "catalogue.yaml").write_text(PRICES)
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "table.jsonl")


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = table(tmp_path, r8={"correct": None}, r21={"correct": 7})
    rules: dict[str, Any] = {"drop_incomplete": False, "folder": tmp_path / "out"}
    assert len(replies_of(path, None, max_bad_share=0.01, **rules)) == 98
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine_table.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines[:2]] == [(9, "missing correct"), (22, "bad correct")]
    with pytest.raises(BadRows, match=r"2 of 200 rows of .* are bad"):
        replies_of(path, None, max_bad_share=0.009, **rules)


def test_questions_that_the_metric_cannot_grade_are_bad_rows(tmp_path: Path) -> None:
    golds = {f"r{i}": {"gold": gold} for i, gold in ((0, "Paris"), (1, "Paris"), (6, ""), (7, ""))}
    task = ThinkRouteArguments(table=table(tmp_path, **golds), metric="numeric")
    run = RunArguments("think_route", max_bad_share=0.1)
    train, heldout = load_questions(task, run, load_replies(task, run, tmp_path), tmp_path)
    assert {row["query_id"] for row in (*train, *heldout)} == {str(i) for i in range(100)} - {"0", "3"}
    found = [p.read_text() for p in sorted(tmp_path.glob("quarantine_*.jsonl"))]
    assert "none of its accepted answers" in "".join(found) and "no accepted answer (gold)" in "".join(found)
    strict = RunArguments("think_route", max_bad_share=0.0)
    with pytest.raises(BadRows, match="questions are bad"):
        load_questions(task, strict, load_replies(task, strict, tmp_path), tmp_path)
    assert gold_problem(["x", "7 apples"], "numeric") == gold_problem(["x"], "em") == ""


def test_question_files_of_a_recipe(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "x", "gold": "" if i == 5 else "x"} for i in range(50)]
    (tmp_path / "train.csv").write_text("question;gold\n" + "".join(f"{r['question']};{r['gold']}\n" for r in rows))
    (tmp_path / "test.json").write_text(json.dumps([{"query": "q7?", "gold": ["x"]}]))
    task = ThinkRouteArguments(
        train_data=[str(tmp_path / "train.csv")],
        test_data=[str(tmp_path / "test.json")],
        pool="endpoint",
        catalogue="unused.yaml",
    )
    train, heldout = load_questions(task, RunArguments("think_route"), None, tmp_path)
    assert len(train) == 48 and [row["query"] for row in heldout] == ["q7?"]  # one is bad, one is tested on
    assert json.loads((tmp_path / "quarantine_train_0.jsonl").read_text())["row"] == 6
