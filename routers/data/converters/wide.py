"""Tables with a row per query and columns per model: RouterBench, SPROUT, and any of that form.

A member is a column of scores with a column of USD per call beside it: `NAME:cost` (as in `routers.data.wide`, whose
tables need no converting), `NAME|total_cost`, `NAME|cost` or `NAME_cost`. Replies and tokens may stand in columns of
the same form: reply or response, prompt_tokens, completion_tokens.

RouterBench publishes pickles of such a frame (routerbench_0shot.pkl and others: sample_id, prompt, eval_name, MODEL,
MODEL|model_response, MODEL|total_cost, oracle_model_to_route_to), whose texts are lists of Python as text.
SPROUT publishes parquet (data/train-*.parquet, validation-*, test-*: key, dataset, prompt, golden_answer, and a struct
per model with score, num_input_tokens, num_output_tokens and response). Form seen in their loaders; `response` not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from routers.data.catalogue import Member
from routers.data.converters.build import TableBuilder, find, tables_beneath

PARTS = {
    "cost": (":cost", "|total_cost", "|cost", "_cost"),
    "reply": (":reply", "|model_response", "|response", "_response"),
    "prompt_tokens": (":prompt_tokens", "|prompt_tokens", "_prompt_tokens"),
    "completion_tokens": (":completion_tokens", "|completion_tokens", "_completion_tokens"),
}
_FACTS = {
    "text": ("query", "prompt", "question"),
    "family": ("family", "eval_name", "task_name", "task", "category", "dataset"),
    "gold": ("gold", "golden_answer", "answer"),
    "split": ("split",),
}
# USD per million tokens, in and out, as the authors' constants.py has them.
_SPROUT_PRICES = {
    "aws-claude-3-5-sonnet-v1": (3.0, 15.0),
    "aws-titan-text-premier-v1": (0.8, 3.2),
    "openai-gpt-4o": (2.5, 10.0),
    "openai-gpt-4o-mini": (0.15, 0.6),
    "wxai-granite-3-2b-instruct-8k-max-tokens": (0.1, 0.1),
    "wxai-granite-3-8b-instruct-8k-max-tokens": (0.2, 0.2),
    "wxai-llama-3-1-70b-instruct": (0.9, 0.9),
    "wxai-llama-3-1-8b-instruct": (0.2, 0.2),
    "wxai-llama-3-2-1b-instruct": (0.06, 0.06),
    "wxai-llama-3-2-3b-instruct": (0.06, 0.06),
    "wxai-llama-3-3-70b-instruct": (0.9, 0.9),
    "wxai-llama-3-405b-instruct": (3.5, 3.5),
    "wxai-mixtral-8x7b-instruct-v01": (0.6, 0.6),
}


def wide(source: Path, table: TableBuilder) -> None:
    """Any such table, or a folder of them."""

    def add(item: dict[str, Any]) -> None:
        _add(table, item)

    for path in tables_beneath(source):
        table.read(path, add)


def routerbench(source: Path, table: TableBuilder) -> None:
    """11 models, replies and USD per call; the set has no split."""

    def add(item: dict[str, Any]) -> None:
        _add(table, {name: _text(value) for name, value in item.items()})

    for path in find(source, "*routerbench*.parquet", "*routerbench*.csv*"):
        table.read(path, add)


def sprout(source: Path, table: TableBuilder) -> None:
    """13 models scored by a judge, their tokens, the set's own split."""
    table.prices = {name: Member(name, name, *pair) for name, pair in _SPROUT_PRICES.items()}

    def add(item: dict[str, Any], split: str) -> None:
        number = table.query(item["prompt"], item.get("dataset"), item.get("golden_answer") or (), split)
        for member, found in item.items():
            if isinstance(found, Mapping) and "score" in found:
                tokens = {"prompt_tokens": found["num_input_tokens"], "completion_tokens": found["num_output_tokens"]}
                table.reply_if_scored(number, member, found["score"], reply=found.get("response"), **tokens)

    for split, part in (("train", "train"), ("train", "validation"), ("test", "test")):
        for path in find(source, f"{part}*.parquet", parts=True):
            table.read(path, partial(add, split=split))


def _add(table: TableBuilder, item: Mapping[str, Any]) -> None:
    facts, members, rest = _columns(tuple(item))
    if table.name == "wide":  # of a published set it is known what else it holds
        table.not_used(rest)
    text, family, gold, split = (None if name is None else item[name] for name in facts)
    number = table.query(text, family, () if gold is None else gold, split)
    for member, parts in members.items():
        told = {part: item[column] for part, column in parts.items()}
        table.reply_if_scored(number, member, item[member], **told)


@lru_cache(maxsize=8)
def _columns(names: tuple[str, ...]) -> tuple[list[str | None], dict[str, dict[str, str]], list[str]]:
    """The columns of `_FACTS`; members with those of their `PARTS`; and the rest."""
    facts = [next((name for name in some if name in names), None) for some in _FACTS.values()]
    beside = (name.removesuffix(suffix) for suffix in PARTS["cost"] for name in names if name.endswith(suffix))
    members = [name for name in dict.fromkeys(beside) if name in names and name not in facts]
    if not members:
        raise ValueError(
            "no column NAME:cost, NAME|total_cost, NAME|cost or NAME_cost is beside a column NAME: none is a member. "
            "A table of scores alone needs no converting: give it with a catalogue (routers/data/README.md)"
        )
    if facts[0] is None:
        raise ValueError(f"no column of queries: call it {', '.join(_FACTS['text'])}")
    found = {
        member: {part: member + end for part, ends in PARTS.items() for end in reversed(ends) if member + end in names}
        for member in members
    }
    used = {*facts, *found, *(column for parts in found.values() for column in parts.values())}
    return facts, found, [name for name in names if name not in used]


def _text(value: Any) -> Any:
    """What RouterBench wrote by `str` of a list of texts: those texts."""
    if isinstance(value, str) and value[:2] in ("['", '["') and value.endswith("]"):
        try:
            parts = ast.literal_eval(value)  # literals only
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        return "\n".join(map(str, parts)) if isinstance(parts, list) else value
    return value
