"""Turns published routing data sets into the table format of ``routers.data.table``.

None of the data ships with this package; ``SOURCES`` says where each set comes from. Where a set lacks what our table
needs, the choice is made here, once:

* token counts: estimated as one token per ``CHARS_PER_TOKEN`` characters of the query or the reply. Where the reply
  was not published either, a multiple-choice answer counts as 1 completion token, any other as
  ``UNKNOWN_REPLY_TOKENS``;
* prices: those the set publishes, else public list prices as we remember them (see each function);
* split: the set's own, else ``routers.data.table.split_of``;
* repeated queries (by normalised text): the first one stays;
* entries that are not as the set has them are left out with their reasons, up to a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from routers.data.catalogue import Member
from routers.data.files import BadRow, read_rows
from routers.data.table import ReplyTable, normalise_query, split_of
from srpo.quarantine import Quarantine

CHARS_PER_TOKEN = 4
UNKNOWN_REPLY_TOKENS = 128
BROKEN_TASKS = ("mbpp", "human_eval")  # RouteProfile's scores of the code tasks are near zero for every model

SOURCES: dict[str, str] = {
    "routellm_mmlu": "github.com/lm-sys/RouteLLM (Apache-2.0)",
    "routellm_gsm8k": "github.com/lm-sys/RouteLLM (Apache-2.0)",
    "llmrouter": "github.com/ulab-uiuc/LLMRouter (MIT)",
    "llmrouter_nq6": "github.com/ulab-uiuc/LLMRouter (MIT), the pool of Router-R1",
    "routeprofile": "github.com/ulab-uiuc/RouteProfile (MIT)",
    "gsm8k_4models": "github.com/openai/grade-school-math (MIT)",
}


@dataclass(frozen=True)
class Converted:
    """Rows in the table format, and the prices that belong to them."""

    rows: list[dict[str, Any]]
    catalogue: dict[str, Member]

    def table(self) -> ReplyTable:
        """The rows, checked and ready for use."""
        return ReplyTable(self.rows, self.catalogue)


def convert(name: str, data_dir: str | Path) -> Converted:
    """Convert the set ``name`` (a key of ``CONVERTERS``) found under ``data_dir``.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the set is not there; the message says where to get it.
    """
    if name not in CONVERTERS:
        raise ValueError(f"no data set {name!r}; known are {', '.join(CONVERTERS)}")
    try:
        return CONVERTERS[name](Path(data_dir))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: not found; download {name} from {SOURCES[name]}") from error


def estimated_tokens(text: str) -> int:
    """About how many tokens ``text`` has, at least 1."""
    return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))


# RouteLLM names no prices per token; these are the list prices of late 2023.
_ROUTELLM_PRICES = {"mixtral-8x7b-instruct-v0.1": (0.24, 0.24), "gpt-4-1106-preview": (10.0, 30.0)}
# OpenAI's list prices of 2022 for models of these sizes. Verification draws 100 solutions and keeps the best.
_GSM8K_PRICES = {
    "6b_finetuning": (2.0, 2.0),
    "6b_verification": (2.0, 200.0),
    "175b_finetuning": (20.0, 20.0),
    "175b_verification": (20.0, 2000.0),
}
# Published per row is cost = completion tokens x these prices (USD per million): whole numbers of tokens in all rows.
_NQ6_PRICES = {
    "qwen/qwen2.5-7b-instruct": 0.30,
    "meta/llama-3.1-70b-instruct": 0.88,
    "mistralai/mistral-7b-instruct-v0.3": 0.20,
    "mistralai/mixtral-8x22b-instruct-v0.1": 1.20,
    "google/gemma-2-27b-it": 0.80,
    "meta/llama-3.1-8b-instruct": 0.18,
}


def _routellm_mmlu(data_dir: Path) -> Converted:
    """10,489 multiple-choice questions x 2 models; neither replies nor gold letters were published."""
    builder = _Builder("routellm_mmlu")

    def add(item: dict[str, Any]) -> None:
        for member in builder.query(item["query"], item["subject"], [], item["correct"]):
            builder.reply(member, item["correct"][member], "", completion_tokens=1)

    builder.read(data_dir / "routellm" / "mmlu.jsonl", add)
    return Converted(builder.rows, _catalogue(_ROUTELLM_PRICES))


def _routellm_gsm8k(data_dir: Path) -> Converted:
    """1,319 word problems x 2 models, with replies."""
    return _with_responses("routellm_gsm8k", data_dir / "routellm" / "gsm8k.jsonl", _ROUTELLM_PRICES)


def _gsm8k_4models(data_dir: Path) -> Converted:
    """1,319 word problems x 4 models, with replies."""
    return _with_responses("gsm8k_4models", data_dir / "gsm8k" / "test_4models.jsonl", _GSM8K_PRICES)


def _with_responses(name: str, path: Path, prices: dict[str, tuple[float, float]]) -> Converted:
    builder = _Builder(name)

    def add(item: dict[str, Any]) -> None:
        for member in builder.query(item["query"], item["task"], [item["gold"]], prices):
            builder.reply(member, item["correct"][member], item["response"][member])

    builder.read(path, add)
    return Converted(builder.rows, _catalogue(prices))


def _llmrouter(data_dir: Path) -> Converted:
    """5,608 training and 381 de-duplicated test queries x 9 models, 14 tasks; replies were not published."""
    folder = data_dir / "llmrouter"
    builder = _Builder("llmrouter")

    def add(item: dict[str, Any], split: str) -> None:
        tokens = 1 if item["metric"] == "em_mc" else UNKNOWN_REPLY_TOKENS
        for member in builder.query(item["query"], item["task"], [item["gold"]], item["score"], split):
            builder.reply(member, item["score"][member], "", completion_tokens=tokens)

    builder.read(folder / "train.jsonl", partial(add, split="train"))
    builder.read(folder / "test_dedup.jsonl", partial(add, split="heldout"))
    return Converted(builder.rows, _published_catalogue(folder / "default_llm.json", builder.rows))


def _llmrouter_nq6(data_dir: Path) -> Converted:
    """500 questions of Natural Questions x 6 models, with replies; completion tokens follow from the costs."""
    builder = _Builder("llmrouter_nq6")

    def add(item: dict[str, Any]) -> None:
        for member in builder.query(item["query"], item["task"], item["gold"], _NQ6_PRICES):
            tokens = round(item["cost"][member] / _NQ6_PRICES[member])
            builder.reply(member, item["score"][member], item["response"][member], completion_tokens=tokens)

    builder.read(data_dir / "llmrouter_nq6" / "replies500.jsonl", add)
    return Converted(builder.rows, _catalogue({name: (price, price) for name, price in _NQ6_PRICES.items()}))


def _routeprofile(data_dir: Path) -> Converted:
    """500 queries of 10 tasks x 8 models, with replies, tokens and prices; the broken code tasks are left out."""
    folder = data_dir / "routeprofile"
    builder = _Builder("routeprofile")

    def add(item: dict[str, Any]) -> None:
        if item["task_name"] in BROKEN_TASKS:
            return
        results = item["model_performance"]
        for member in builder.query(item["query"], item["task_name"], [item["ground_truth"]], results):
            result = results[member]
            row = builder.reply(member, result["task_performance"], result["response"], result["completion_tokens"])
            row["prompt_tokens"] = result["prompt_tokens"]

    builder.read(folder / "routing_test_data.json", add)
    return Converted(builder.rows, _published_catalogue(folder / "candidate_models.json", builder.rows))


CONVERTERS: dict[str, Callable[[Path], Converted]] = {
    "routellm_mmlu": _routellm_mmlu,
    "routellm_gsm8k": _routellm_gsm8k,
    "llmrouter": _llmrouter,
    "llmrouter_nq6": _llmrouter_nq6,
    "routeprofile": _routeprofile,
    "gsm8k_4models": _gsm8k_4models,
}


class _Builder:
    """Collects rows and drops queries that came before."""

    def __init__(self, name: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._name = name
        self._seen: set[str] = set()
        self._added = ""
        self._current: dict[str, Any] = {}

    def read(self, path: Path, add: Callable[[dict[str, Any]], None]) -> None:
        """Add every entry of a file; one that fails leaves nothing behind.

        Raises:
            FileNotFoundError: no such file.
            BadRows: too many entries are not as the set has them.
        """
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        entries = read_rows(path)
        bad = Quarantine(f"rows of {path}", label=f"{path.name}: ")
        for number, item in entries:
            rows, self._added = len(self.rows), ""
            try:
                if isinstance(item, BadRow):
                    raise ValueError(item.detail)
                add(item)
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                del self.rows[rows:]
                self._seen.discard(self._added)
                missing = isinstance(error, KeyError)
                bad.add(number, "another form", f"field {error} is missing" if missing else str(error), item)
        bad.settle(len(entries))

    def query(
        self, text: str, family: str, gold: list[str], members: dict[str, Any], split: str | None = None
    ) -> list[str]:
        """Start a query; returns the members to add replies for, which is none if the query is a repetition."""
        normalised = normalise_query(text)
        if normalised in self._seen:
            return []
        self._seen.add(normalised)
        self._added = normalised
        self._current = {
            "query_id": f"{self._name}-{len(self._seen):05d}",
            "query": text,
            "family": family,
            "split": split or split_of(text),
            "gold": gold,
        }
        return list(members)

    def reply(self, member: str, correct: float, reply: str, completion_tokens: int | None = None) -> dict[str, Any]:
        """Add one reply to the query that was started, and return its row."""
        tokens = estimated_tokens(reply) if completion_tokens is None else completion_tokens
        if not isinstance(reply, str):
            raise ValueError(f"the reply of {member} is {reply!r}; it must be text")
        row = self._current | {
            "member": member,
            "reply": reply,
            "prompt_tokens": estimated_tokens(self._current["query"]),
            "completion_tokens": tokens,
            "correct": float(correct),
        }
        self.rows.append(row)
        return row


def _catalogue(prices: dict[str, tuple[float, float]]) -> dict[str, Member]:
    return {name: Member(name, name, price_in, price_out) for name, (price_in, price_out) in prices.items()}


def _published_catalogue(path: Path, rows: list[dict[str, Any]]) -> dict[str, Member]:
    """Prices and descriptors out of a ``{name: {feature, input_price, output_price}}`` file, for members with rows."""
    listed = read_rows(path)[0].value
    names = dict.fromkeys(row["member"] for row in rows)
    if without := [name for name in names if name not in listed]:
        raise ValueError(f"{path}: there is no price of {without[0]!r}; it has {', '.join(listed)}")
    return {
        name: Member(name, listed[name]["feature"], listed[name]["input_price"], listed[name]["output_price"])
        for name in names
    }
