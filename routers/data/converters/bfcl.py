"""Folders that `bfcl generate` and `bfcl evaluate` (bfcl-eval, ShishirPatil/gorilla) leave behind.

result/MODEL/[GROUP/]BFCL_v4_CATEGORY_result.json: a line per task {id, result, input_token_count, output_token_count,
latency} (counts are nested lists, one number a step). score/MODEL/[GROUP/]BFCL_v4_CATEGORY_score.json: a first line
{accuracy, correct_count, total_count}, then a line for every task that failed. The questions stand in the package's
data/BFCL_v4_CATEGORY.json {id, question: turns of messages}, which is beneath the source or in an installed bfcl_eval.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from routers.data.converters.build import TableBuilder, find, formed
from routers.data.files import Row


def bfcl(source: Path, table: TableBuilder) -> None:
    """The models whose folders are there; no prices were published."""
    for path in find(source, "result/**/BFCL_v*_result.json"):
        category = path.stem.removesuffix("_result")
        results = next(p for p in path.parents if p.name == "result")
        member = path.relative_to(results).parts[0]
        scores = (results.parent / "score" / path.relative_to(results)).with_name(f"{category}_score.json")
        if not scores.is_file():
            table.drop("not evaluated", str(path))
            continue
        with formed(scores, "a line of correct_count and total_count, and a line with an id for every failure"):
            header, *failed = (row.value for row in _lines(scores))
            wrong = {one["id"] for one in failed}
            failures = header["total_count"] - header["correct_count"]
        if failures != len(wrong):
            raise ValueError(f"{scores}: its first line counts {failures} failures, and {len(wrong)} follow")
        with formed(data := _data(source, category), "lines of id and question, which is turns of messages"):
            questions = {row.value["id"]: _text(row.value["question"]) for row in _lines(data)}

        def add(item: dict[str, Any], member: str = member, wrong: set[str] = wrong, texts: Any = questions) -> None:
            number = table.query(texts[item["id"]], item["id"].rpartition("_")[0], key=item["id"])
            result = item["result"]
            table.reply(
                number, member, item["id"] not in wrong,
                reply=result if isinstance(result, str) else json.dumps(result, ensure_ascii=False),
                prompt_tokens=_sum(item.get("input_token_count")), seconds=_sum(item.get("latency")),
                completion_tokens=_sum(item.get("output_token_count")),
            )  # fmt: skip

        table.add_all(f"{member}/{path.name}", _lines(path), add, f"rows of {path}")


def _lines(path: Path) -> list[Row]:
    """JSON lines, whatever the name says."""
    try:
        return [Row(n, json.loads(line)) for n, line in enumerate(path.open(encoding="utf-8"), 1) if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON lines ({error})") from None


def _data(source: Path, category: str) -> Path:
    """Where the questions of a category stand."""
    found = importlib.util.find_spec("bfcl_eval")
    package = [Path(place, "data") for place in (found.submodule_search_locations or () if found else ())]
    for folder in (source, *package):
        if paths := sorted(folder.rglob(f"{category}.json")):
            return paths[0]
    raise FileNotFoundError(2, f"there is no {category}.json with the questions (pip install bfcl-eval)", str(source))


def _text(turns: list[list[dict[str, Any]]]) -> str:
    return "\n".join(message["content"] for turn in turns for message in turn if message["role"] == "user")


def _sum(counts: Any) -> float | None:
    return sum(_sum(count) or 0 for count in counts) if isinstance(counts, list) else counts
