"""openai/grade-school-math: the test problems solved by four models of 2021.

Official: grade_school_math/data/example_model_solutions.jsonl with question, ground_truth ("...A: 18") and per model
{is_correct, solution}. Or JSON lines: query, gold, correct {model: bool}, response {model: text}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routers.data.converters.build import TableBuilder, find_one
from routers.data.converters.routellm import members

# OpenAI's list prices of 2022 for models of these sizes. Verification draws 100 solutions and keeps the best.
PRICES = {
    "6b_finetuning": (2.0, 2.0),
    "6b_verification": (2.0, 200.0),
    "175b_finetuning": (20.0, 20.0),
    "175b_verification": (20.0, 2000.0),
}


def gsm8k_4models(source: Path, table: TableBuilder) -> None:
    """Word problems, with replies."""
    table.prices = members(PRICES)

    def add(item: dict[str, Any]) -> None:
        if "question" in item:
            replies = {name: (item[name]["is_correct"], item[name]["solution"]) for name in PRICES}
            number = table.query(item["question"], "gsm8k", item["ground_truth"].rpartition("A: ")[2])
        else:
            replies = {name: (item["correct"][name], item["response"][name]) for name in PRICES}
            number = table.query(item["query"], "gsm8k", item["gold"])
        for member, (correct, reply) in replies.items():
            table.reply(number, member, correct, reply=reply)

    table.read(
        find_one(source, "gsm8k/test_4models.jsonl", "test_4models.jsonl", "example_model_solutions.jsonl"), add
    )
