"""LLMRouterBench (ynulihao/LLMRouterBench): bench-release.tar.gz, unpacked to bench/DATASET/SPLIT/MODEL/TIME.json.

A file is {dataset_name, split, model_name, demo, records: [{index, origin_query, prompt, prediction, raw_output,
ground_truth, score, prompt_tokens, completion_tokens, cost}]}; of several of one dataset, split and model the newest
counts, demos do not, and no cost is 0, as the set's own loader has it. Two pools answered different datasets (20 small
models without costs, 13 large ones with): the one that keeps most replies is converted, or `--members`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from routers.data.converters.build import TableBuilder, find, formed
from routers.data.files import Row


def llmrouterbench(source: Path, table: TableBuilder) -> None:
    """21 datasets x 33 models, replies, tokens, USD per call; the set draws its splits at random: by text here."""
    newest: dict[tuple[str, ...], Path] = {}
    for path in find(source, "bench/*/*/*/*.json", "*/*/*/*.json", "*.json"):
        newest[path.parts[-4:-1]] = max(newest.get(path.parts[-4:-1], path), path, key=_time)
    for path in newest.values():
        with formed(path, "a result of LLMRouterBench"):
            found = json.loads(path.read_text(encoding="utf-8"))
            dataset, part, member, records = (found[k] for k in ("dataset_name", "split", "model_name", "records"))
            rows = [Row(n, record) for n, record in enumerate(records, start=1)]
        if found.get("demo"):
            table.drop("demo", str(path))
            continue

        def add(item: dict[str, Any], key: tuple[str, ...] = (dataset, part), member: str = member) -> None:
            truth = item.get("ground_truth")
            gold = truth if isinstance(truth, (str, int, float)) else ()
            number = table.query(item["prompt"] or item["origin_query"], key[0], gold, key=(*key, item["index"]))
            table.reply(
                number, member, item["score"], cost=item.get("cost") or 0.0, reply=_reply(item),
                prompt_tokens=item.get("prompt_tokens"), completion_tokens=item.get("completion_tokens"),
            )  # fmt: skip

        table.add_all(f"{dataset}/{part}/{member}/{path.name}", rows, add, f"records of {path}")


def _time(path: Path) -> tuple[str, float]:
    stamp = re.search(r"(\d{8}_\d{6})\.json$", path.name)
    return (stamp[1] if stamp else "", path.stat().st_mtime)


def _reply(item: dict[str, Any]) -> str | None:
    found = item.get("raw_output") or item.get("prediction")
    return found if found is None or isinstance(found, str) else json.dumps(found, ensure_ascii=False)
