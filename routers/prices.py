"""Prices out of litellm's public table, so that nobody copies price lists by hand.

The table is one JSON file, ``model_prices_and_context_window.json`` of https://github.com/BerriAI/litellm: download it
and name it in the catalogue (``price_table: FILE``), or ``pip install litellm``, whose package carries a copy. litellm
itself is never imported, and nothing is fetched: prices of a run must not change under it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

URL = "https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json"
_PACKAGED = "model_prices_and_context_window_backup.json"
_SCALE = 1_000_000  # litellm quotes USD per token, catalogues USD per million


def litellm_table(path: str | Path | None = None) -> dict[str, Any]:
    """The table ``{model key: {input_cost_per_token, ...}}`` from a file, or from the installed package.

    Raises:
        ValueError: no file, or not such a table; the message says how to get one.
    """
    if path is None:
        package = find_spec("litellm")  # finds without importing
        if package is None or package.origin is None:
            raise ValueError(f"no price table; download {URL} and name it as price_table, or pip install litellm")
        path = Path(package.origin).with_name(_PACKAGED)
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as litellm's price table ({error}); download {URL}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: litellm's price table is one JSON object; download {URL}")
    return table


def litellm_fields(table: dict[str, Any], key: str) -> dict[str, Any]:
    """Catalogue fields of one model: ``price_in`` and ``price_out`` in USD per million tokens, ``context_length``
    where the table has it.

    Raises:
        ValueError: the key or its prices are missing; similar keys are named.
    """
    entry = table.get(key)
    if not isinstance(entry, dict):
        similar = sorted(name for name in table if key.split("/")[-1].lower() in name.lower())[:5]
        hint = f"; similar keys: {', '.join(similar)}" if similar else ""
        raise ValueError(f"litellm's table has no model {key!r}{hint}")
    fields: dict[str, Any] = {}
    for field, source in (("price_in", "input_cost_per_token"), ("price_out", "output_cost_per_token")):
        value = entry.get(source)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"litellm's table has no {source} of {key!r}; write {field} yourself")
        fields[field] = round(value * _SCALE, 9)  # 1.5e-07 * 1e6 is 0.15, not 0.15000000000000002
    window = entry.get("max_input_tokens")
    if isinstance(window, int) and window > 0:
        fields["context_length"] = window
    return fields
