"""lm-sys/RouteLLM: MMLU and GSM8K answered by Mixtral-8x7B and GPT-4, correct or not.

Official: routellm/evals/mmlu/responses/mmlu_SUBJECT.csv with `prompt` and a column of True and False per model;
routellm/evals/gsm8k/gsm8k_responses.csv with `MODEL_response` beside, and test.jsonl with the answers. Or JSON lines:
query, subject or gold, correct {model: bool}, response {model: text}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routers.data.catalogue import Member
from routers.data.converters.build import TableBuilder, entries, find, find_one, formed

# RouteLLM names no prices per token; these are the list prices of late 2023.
PRICES = {"mixtral-8x7b-instruct-v0.1": (0.24, 0.24), "gpt-4-1106-preview": (10.0, 30.0)}
_ORGANISATION = "mistralai/"


def mmlu(source: Path, table: TableBuilder) -> None:
    """Multiple choice: a reply is one letter, and neither replies nor gold letters were published."""
    table.prices = members(PRICES)

    def add(item: dict[str, Any]) -> None:
        number = table.query(item["prompt" if "prompt" in item else "query"], item.get("subject") or subject)
        for member in PRICES:
            table.reply(number, member, _correct(item, member), completion_tokens=1)

    for path in find(source, "routellm/mmlu.jsonl", "mmlu.jsonl", "mmlu_*.csv"):
        subject = path.stem.removeprefix("mmlu_")
        table.read(path, add)


def gsm8k(source: Path, table: TableBuilder) -> None:
    """Word problems, with replies."""
    table.prices = members(PRICES)
    path = find_one(source, "routellm/gsm8k.jsonl", "gsm8k.jsonl", "gsm8k_responses.csv")
    answers = path.with_name("test.jsonl")
    rows = entries(answers) if path.suffix == ".csv" and answers.exists() else ()
    with formed(answers, "lines of question and answer"):
        gold = {row.value["question"]: row.value["answer"].rpartition("#### ")[2] for row in rows}

    def add(item: dict[str, Any]) -> None:
        text = item["prompt" if "prompt" in item else "query"]
        number = table.query(text, "gsm8k", item.get("gold") or gold.get(text, ()))
        for member in PRICES:
            named = item["response"][member] if "response" in item else item[f"{_column(item, member)}_response"]
            table.reply(number, member, _correct(item, member), reply=named)

    table.read(path, add)


def members(prices: dict[str, tuple[float, float]]) -> dict[str, Member]:
    """Members out of prices in and out, USD per million tokens."""
    return {name: Member(name, name, *pair) for name, pair in prices.items()}


def _correct(item: dict[str, Any], member: str) -> Any:
    return item["correct"][member] if "correct" in item else item[_column(item, member)]


def _column(item: dict[str, Any], member: str) -> str:
    return next((name for name in item if name.lower().removeprefix(_ORGANISATION) == member), member)
