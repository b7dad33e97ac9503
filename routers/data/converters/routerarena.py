"""RouterArena (RouteWorks/RouterArena), for evaluation only: routers are ranked by it.

Of its repository router_inference/predictions/NAME.json, as the official evaluation fills them: lists of {global
index, prompt, prediction (the model), generated_result {generated_answer, success, token_usage {input_tokens,
output_tokens}}, cost (USD), accuracy}. Each router asked one model per query (and more where `for_optimality` is set);
together they give replies of several. Predictions that nobody has evaluated say nothing, nor do those on noisy copies
(-robustness).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routers.data.converters.build import TableBuilder, find


def routerarena(source: Path, table: TableBuilder) -> None:
    """Every query is held out."""

    def add(item: dict[str, Any]) -> None:
        index, result = item.get("global index") or item["global_index"], item.get("generated_result") or {}
        if item.get("accuracy") is None:
            table.drop("not evaluated", f"{item['prediction']} on {index}")
            return
        number = table.query(item["prompt"], index.rpartition("_")[0], (), "test", key=index)
        tokens = result.get("token_usage") or {}
        table.reply(
            number, item["prediction"], item["accuracy"], cost=item["cost"], reply=result.get("generated_answer"),
            prompt_tokens=tokens.get("input_tokens"), completion_tokens=tokens.get("output_tokens"),
        )  # fmt: skip

    for path in find(source, "predictions/*.json", "*.json"):
        if not path.stem.endswith("-robustness"):
            table.read(path, add)
