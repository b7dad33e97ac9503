"""ulab-uiuc: LLMRouter's default data, xRouteBench, the pool of Router-R1, and RouteProfile.

LLMRouter writes one row per query and model (routing_data_train.jsonl, routing_data_test.jsonl, or .csv): task_name,
query, ground_truth (older: gt), metric, model_name, response, performance, input_tokens and output_tokens (older:
prompt_tokens, completion_tokens), response_time. xRouteBench is the same as parquet, a folder per set
(huggingface.co/datasets/ulab-ai/xRouteBench). Prices stand in default_llm.json, {name: {feature, input_price,
output_price}}, or in xRouteBench's llm_candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from routers.data import cells
from routers.data.catalogue import Member
from routers.data.converters.build import UNKNOWN_REPLY_TOKENS, TableBuilder, entries, find, find_one, formed

BROKEN_TASKS = ("mbpp", "human_eval")
"""RouteProfile's scores of the code tasks are near zero for every model."""
# Published per row is cost = completion tokens x these prices (USD per million): whole numbers of tokens in all rows.
_NQ6_PRICES = {
    "qwen/qwen2.5-7b-instruct": 0.30,
    "meta/llama-3.1-70b-instruct": 0.88,
    "mistralai/mistral-7b-instruct-v0.3": 0.20,
    "mistralai/mixtral-8x22b-instruct-v0.1": 1.20,
    "google/gemma-2-27b-it": 0.80,
    "meta/llama-3.1-8b-instruct": 0.18,
}
_OTHER_SETS = ("personalized", "llm_candidates")


def llmrouter(source: Path, table: TableBuilder) -> None:
    """14 tasks x 9 models, the set's own split; of its copy without replies one row per query: query, task, gold,
    metric, score {model: number} in train.jsonl and test_dedup.jsonl."""

    def add(item: dict[str, Any], split: str) -> None:
        tokens = 1 if item["metric"] == "em_mc" else UNKNOWN_REPLY_TOKENS
        number = table.query(item["query"], item["task"], item["gold"], split)
        for member, score in item["score"].items():
            table.reply(number, member, score, completion_tokens=tokens)

    try:
        parts = (
            find(source, "llmrouter/train.jsonl", "train.jsonl", parts=True),
            find(source, "test_dedup.jsonl", parts=True),
        )
        for paths, split in zip(parts, ("train", "test"), strict=True):
            table.read(paths[0], partial(add, split=split))
    except FileNotFoundError:
        _long(table, find(source, "*routing*train*.jsonl", "*routing*train*.csv", parts=True), "train")
        _long(table, find(source, "*routing*test*.jsonl", "*routing*test*.csv", parts=True), "test")
    table.prices = _prices(_candidates(source))


def xroutebench(source: Path, table: TableBuilder) -> None:
    """The sets beneath a folder, each with its own split; pairwise preferences (personalized) have no scores."""
    for split in ("train", "test"):
        paths = find(source, f"routing_data_{split}.jsonl", f"{split}*.parquet", parts=True)
        queries = [path for path in paths if not path.parent.name.endswith(("_queries", *_OTHER_SETS))]
        _long(table, queries, split)
    table.prices = _prices(_candidates(source))


def llmrouter_nq6(source: Path, table: TableBuilder) -> None:
    """Natural Questions x the 6 models of Router-R1, with replies; completion tokens follow from the costs."""
    table.prices = {name: Member(name, name, price, price) for name, price in _NQ6_PRICES.items()}

    def add(item: dict[str, Any]) -> None:
        number = table.query(item["query"], item["task"], item["gold"])
        for member, price in _NQ6_PRICES.items():
            told = {"reply": item["response"][member], "completion_tokens": round(item["cost"][member] / price)}
            table.reply(number, member, item["score"][member], **told)

    table.read(find_one(source, "replies500.jsonl"), add)


def routeprofile(source: Path, table: TableBuilder) -> None:
    """Queries of 12 tasks x 8 models: route_data/routing_test_data.json, a list of task_name, query, ground_truth and
    model_performance {model: {response, task_performance, prompt_tokens, completion_tokens}}; prices in
    profile_data/candidate_models.json."""

    def add(item: dict[str, Any]) -> None:
        if item["task_name"] in BROKEN_TASKS:
            table.drop("broken task", item["query"])
            return
        number = table.query(item["query"], item["task_name"], [item["ground_truth"]])
        for member, result in item["model_performance"].items():
            tokens = {name: result[name] for name in ("prompt_tokens", "completion_tokens")}
            table.reply(number, member, result["task_performance"], reply=result["response"], **tokens)

    for path in find(source, "routing_test_data.json"):
        table.read(path, add)
    table.prices = _prices(find(source if source.is_dir() else source.parent, "candidate_models.json")[0])


def _long(table: TableBuilder, paths: Iterable[Path], split: str) -> None:
    def add(item: dict[str, Any]) -> None:
        text = item["query"]
        gold = item.get("ground_truth", item.get("gt", ()))
        number = table.query(text, item["task_name"], gold, split, key=(split, text))
        tokens = {
            "prompt_tokens": item.get("input_tokens", item.get("prompt_tokens")),
            "completion_tokens": item.get("output_tokens", item.get("completion_tokens")),
        }
        table.reply(
            number, item["model_name"], item["performance"],
            reply=item.get("response"), seconds=item.get("response_time"), **tokens,
        )  # fmt: skip

    for path in paths:
        table.read(path, add)


def _candidates(source: Path) -> Path:
    for folder in (source, source.parent):
        for pattern in ("default_llm.json", "llm_candidates/*.parquet", "llm_candidates/*.jsonl"):
            if found := sorted(folder.rglob(pattern) if folder == source else folder.glob(pattern)):
                return found[0]
    raise FileNotFoundError(2, "there is no default_llm.json and no llm_candidates", str(source))


def _prices(path: Path) -> dict[str, Member]:
    """Of a file of candidates: one mapping by name, or a row each."""
    rows = [row.value for row in entries(path)]
    with formed(path, "models with their feature, input_price and output_price"):
        listed = rows[0] if path.suffix == ".json" else {row["model_name"]: row for row in rows}
        priced = {name: one for name, one in listed.items() if "input_price" in one or "input_price_per_1m" in one}
        return {name: _priced(name, one) for name, one in priced.items()}


def _priced(name: str, one: Mapping[str, Any]) -> Member:
    feature = one.get("feature") or one.get("description") or name
    prices = []
    for kind in ("input_price", "output_price"):
        told = one[kind if kind in one else f"{kind}_per_1m"]
        try:
            prices.append(cells.number(told))
        except ValueError as error:
            raise ValueError(f"{kind} of {name!r} is {told!r}; {error}") from None
    return Member(name, " ".join(cells.text(feature).split()), price_in=prices[0], price_out=prices[1])
