"""Who was right, and nothing else: EmbedLLM and RouterEval. No tokens and no costs were published.

EmbedLLM (train.csv, val.csv, test.csv): a row per prompt and model with prompt_id, prompt, category, model_id,
model_name, label (0 or 1).
RouterEval publishes pickles (router_dataset/NAME_router_dataset.pkl), which are not read; save a pool of one as JSON:

    import json, pickle
    data = pickle.load(open("gsm8k_router_dataset.pkl", "rb"))
    pool = data["hard"][10]["strong_to_weak"]
    scores = {part: matrix.tolist() for part, matrix in pool["data"].items() if part.endswith("_score")}
    prompts = {part: list(map(str, texts)) for part, texts in data["prompt"].items()}
    json.dump({"model": list(map(str, pool["model"])), "prompt": prompts, "data": scores}, open("gsm8k.json", "w"))
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from routers.data.converters.build import TableBuilder, find, formed
from routers.data.files import Row

_FORM = (
    "a mapping of model, prompt {train_prompt, val_prompt, test_prompt} and data {train_score, val_score, "
    "test_score}, as routers.data.converters.matrix says"
)
_PARTS = (("train", "train"), ("train", "val"), ("test", "test"))


def embedllm(source: Path, table: TableBuilder) -> None:
    """112 open models, 35,673 prompts."""

    def add(item: dict[str, Any], split: str, part: str) -> None:
        number = table.query(
            item["prompt"], item.get("category"), (), split, key=(part, item["prompt_id"], item["prompt"])
        )
        table.reply(number, str(item.get("model_name") or item["model_id"]), item["label"])

    for split, part in _PARTS:
        for path in find(source, f"{part}.csv", parts=True):
            table.read(path, partial(add, split=split, part=part))


def routereval(source: Path, table: TableBuilder) -> None:
    """A pool of one of 12 benchmarks; matrices are queries x models."""

    def add(item: dict[str, Any], split: str, family: str) -> None:
        number = table.query(item["prompt"], family, (), split)
        for member, score in item["scores"].items():
            table.reply(number, member, score)

    for path in find(source, "*.json"):
        with formed(path, _FORM):
            found = json.loads(path.read_text(encoding="utf-8"))
            members, prompts, scores = list(map(str, found["model"])), found["prompt"], found["data"]
            parts = {part: [*map(list, (prompts[f"{part}_prompt"], scores[f"{part}_score"]))] for _, part in _PARTS}
            several = {part: {len(row) for row in matrix} - {len(members)} for part, (_, matrix) in parts.items()}
        if twice := [name for name in members if members.count(name) > 1]:
            raise ValueError(f"{path}: the model {twice[0]!r} is listed twice; rename one of them")
        for split, part in _PARTS:
            texts, matrix = parts[part]
            if len(texts) != len(matrix) or several[part]:
                raise ValueError(f"{path}: {part}_score is not {len(texts)} prompts x {len(members)} models")
            rows = [
                Row(n, {"prompt": text, "scores": dict(zip(members, row, strict=True))})
                for n, (text, row) in enumerate(zip(texts, matrix, strict=True), start=1)
            ]
            family = path.stem.removesuffix("_router_dataset")
            table.add_all(f"{path.name}, {part}", rows, partial(add, split=split, family=family), f"rows of {path}")
