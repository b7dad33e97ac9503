"""Prices out of litellm's public table, so that nobody copies price lists by hand.

The table is one JSON file, ``model_prices_and_context_window.json`` of https://github.com/BerriAI/litellm: download it
and name it in the catalogue (``price_table: FILE``), or ``pip install litellm``, whose package carries a copy. litellm
itself is never imported, and nothing is fetched: prices of a run must not change under it.

An entry has dozens of keys. Those in ``_FIELDS`` and tiers of them become fields of a catalogue, those in ``_IGNORED``
say nothing about a text chat call of ours, and whatever else may be a price is an error: a run must not be billed by
half a price list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

URL = "https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json"
_PACKAGED = "model_prices_and_context_window_backup.json"
_SCALE = 1_000_000  # litellm quotes USD per token, catalogues USD per million

_FIELDS = {
    "price_in": ("input_cost_per_token",),
    "price_out": ("output_cost_per_token",),
    "price_cached": ("cache_read_input_token_cost", "input_cost_per_token_cache_hit"),
    "price_cache_write": ("cache_creation_input_token_cost",),
    "price_cache_write_1h": (
        "cache_creation_input_token_cost_above_1hr",
        "cache_creation_input_token_cost_above_12hr",
    ),
    "price_reasoning": ("output_cost_per_reasoning_token",),
}
"""Catalogue field -> litellm's names for it."""
_NAMES = {name: field for field, names in _FIELDS.items() for name in names}
_ABOVE = re.compile(r"(?P<name>\w+?)_above_(?P<thousands>\d+)k_tokens$")

_IGNORED = re.compile(
    r"""
    .*_(batches|priority|flex|balanced|ultrafast|decisions)$   # other service tiers: ours is the default one
    | .*(audio|image|video|pixel).*                            # our prompts and replies are text
    | explicit_cache_.*                                        # caching that a request has to ask for
    | (computer_use|file_search|code_interpreter|vector_store|google_maps_grounding)_.*   # tools of the provider
    | web_search_billing_unit | search_free_requests           # the same
    | (in|out)put_dbu_cost_per_token                           # the same price in another currency
    | (fedramp|regional)_.*uplift_multiplier(_\w+)?            # special endpoints
    | provider_specific_entry                                  # factors of options that a request has to ask for
    # what says nothing about money
    | (supports|supported|thinking|bedrock|reasoning|use|default|token_count)_\w+
    | max_(input_|output_)?tokens | max_\w+_per_(prompt|request) | tpm | rpm | mode | litellm_provider | source
    | metadata | comment | deprecation_\w+ | successor_model | prompt_cache_min_tokens | uses_embed_content
    """,
    re.VERBOSE,
)
_FEES = ("input_cost_per_request", "search_context_cost_per_query", "input_cost_per_query")
_ASKED_FOR = {"service_tier", "speed", "inference_geo", "web_search_options", "plugins", "cache_control",
              "prompt_cache_retention", "modalities", "audio"}  # fmt: skip
"""Fields of a request that change the price of a token or add a fee."""
_CHAT = (None, "chat", "completion", "responses")


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
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as litellm's price table ({error}); download {URL}") from error
    return parsed_table(text, path)


def parsed_table(text: str, path: str | Path) -> dict[str, Any]:
    """`litellm_table` of its text; `path`: where that is from, for errors."""
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except _Twice as error:
        raise ValueError(f"{path}: the key {error} is written twice; keep one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as litellm's price table ({error}); download {URL}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: litellm's price table is one JSON object; download {URL}")
    return table


def entries_of(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The part of a table that says what this key costs: its entry, and the one that it is another name of."""
    entry = table.get(key)
    other = entry.get("alias_of") if isinstance(entry, dict) else None
    return {name: table[name] for name in (key, other) if isinstance(name, str) and name in table}


def litellm_fields(table: Mapping[str, Any], key: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Catalogue fields of one model: the prices, and ``context_length`` where the table has it.

    Args:
        table: of `litellm_table`.
        key: the model's.
        own: fields that the catalogue states itself. With both ``price_in`` and ``price_out`` there, no price is read.

    Raises:
        ValueError: the key or its prices are missing (similar keys are named), it is no text chat model, or the table
            says something about its price that a catalogue cannot express, or that we do not know.
    """
    own = own or {}
    entry = table.get(key)
    other = entry.get("alias_of") if isinstance(entry, dict) and len(entry) == 1 else None
    if isinstance(other, str):
        key, entry = other, table.get(other)  # such as "claude-opus-latest"
    if not isinstance(entry, dict):
        similar = sorted(name for name in table if key.split("/")[-1].lower() in name.lower())[:5]
        hint = f"; similar keys: {', '.join(similar)}" if similar else ""
        raise ValueError(f"litellm's table has no model {key!r}{hint}")
    fields: dict[str, Any] = {}
    window = entry.get("max_input_tokens")
    if isinstance(window, int) and not isinstance(window, bool) and window > 0:
        fields["context_length"] = window
    if own.get("price_in") is not None and own.get("price_out") is not None:
        return fields
    if entry.get("mode") not in _CHAT:
        raise ValueError(f"{key!r} is no text chat model in litellm's table (mode {entry['mode']!r})")
    asked = sorted(_ASKED_FOR & _set_fields(own.get("request")))
    if asked == ["cache_control"]:
        if own.get("cache_seconds") is None:
            raise ValueError(
                "the member's request sets 'cache_control', whose time decides what writing costs; write "
                "cache_seconds: 300, or 3600 where it asks for an hour"
            )
    elif asked:
        raise ValueError(f"the member's request sets {asked[0]!r}, which changes the price; {_YOURSELF}")
    fields |= _flat_prices(entry, key, own)
    tiers = _tiers(entry, fields)
    if tiers:
        fields["price_tiers"] = tiers
    _refuse_the_rest(entry, key)
    if entry.get("prompt_cache_min_tokens"):
        fields["cache_min_tokens"] = _tokens(entry["prompt_cache_min_tokens"], "prompt_cache_min_tokens")
    return fields


_YOURSELF = "write price_in and price_out (and what else there is to pay) yourself"


def _flat_prices(entry: Mapping[str, Any], key: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the tiers."""
    found = _prices(entry)
    for tier in entry.get("tiered_pricing") or ():
        if isinstance(tier, dict) and isinstance(tier.get("range"), list) and tier["range"][:1] == [0]:
            found = {**_prices(tier), **found}
    for field in ("price_in", "price_out"):
        if field not in found and own.get(field) is None:
            raise ValueError(f"litellm's table has no {_FIELDS[field][0]} of {key!r}; write {field} yourself")
    fees = [_usd(entry[name], name) for name in _FEES if entry.get(name) is not None and _due(name, entry, key)]
    if len(fees) > 1:
        raise ValueError(f"litellm's table has several fees per request of {key!r}; {_YOURSELF}")
    if fees and fees[0]:
        found["price_request"] = fees[0]
    return _with_dear_writes(found)


def _due(fee: str, entry: Mapping[str, Any], key: str) -> bool:
    """Whether every call pays this fee. One per search is due only where a model searches unasked."""
    if fee != "search_context_cost_per_query":
        return True
    return entry.get("litellm_provider") == "perplexity" or bool(re.search(r"search|sonar|online", key, re.IGNORECASE))


def _prices(entry: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for field, names in _FIELDS.items():
        stated = {_usd(entry[name + suffix], name + suffix) for name in names if entry.get(name + suffix) is not None}
        if len(stated) > 1:
            raise ValueError(f"litellm's table says {' and '.join(names)}, and they differ; {_YOURSELF}")
        for usd in stated:
            found[field] = round(usd * _SCALE, 9)  # 1.5e-07 * 1e6 is 0.15, not 0.15000000000000002
    return found


def _with_dear_writes(prices: dict[str, Any]) -> dict[str, Any]:
    """Without prices of writing that are below that of the prompt."""
    plain = prices.get("price_in", 0.0)
    return {n: price for n, price in prices.items() if not (n.startswith("price_cache_write") and price < plain)}


def _tiers(entry: Mapping[str, Any], base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of either form: keys that end in _above_200k_tokens, or a list of ranges."""
    known = {"price_in", "price_out"}
    plain = {field: base[field] for field in known if field in base}
    found: dict[int, dict[str, Any]] = {}
    for name in entry:
        match = _ABOVE.fullmatch(name)
        if match and match["name"] in _NAMES:
            suffix = name.removeprefix(match["name"])
            found[int(match["thousands"]) * 1000] = _with_dear_writes({**plain, **_prices(entry, suffix)})
    ranges = entry.get("tiered_pricing") or []
    if ranges and found:
        raise ValueError(f"litellm's table has two kinds of tiers; {_YOURSELF}")
    if not isinstance(ranges, list):
        raise ValueError(f"tiered_pricing is no list in litellm's table; {_YOURSELF}")
    for tier in ranges:
        unknown = sorted(tier.keys() - {*_NAMES, "range"}) if isinstance(tier, dict) else ["tier"]
        if unknown:
            raise ValueError(f"litellm's table says {unknown[0]!r} in tiered_pricing, which is not known; {_YOURSELF}")
        bounds = tier.get("range")
        start = bounds[0] if isinstance(bounds, list) and bounds else None
        prices = _prices(tier)
        if not known <= prices.keys() or not isinstance(start, (int, float)) or not start >= 0:
            raise ValueError(f"a tier in litellm's table has no range, or no prices; {_YOURSELF}")
        if start > 0:
            found[int(start)] = _with_dear_writes(prices)
    return [{"above": above, **found[above]} for above in sorted(found)]


def _refuse_the_rest(entry: Mapping[str, Any], key: str) -> None:
    """Whatever is not understood and may be a price."""
    for name, value in entry.items():
        tier = _ABOVE.fullmatch(name)
        known = name in _NAMES or name in _FEES or name == "tiered_pricing" or (tier and tier["name"] in _NAMES)
        if known or _IGNORED.fullmatch(name) or not any(_leaves(value)):
            continue
        raise ValueError(f"litellm's table says {name!r} about {key!r}, which a catalogue cannot express; {_YOURSELF}")


def _leaves(value: Any) -> Iterable[bool]:
    """For every plain value inside, whether it may be an amount: a number other than 0, or one written as text."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield bool(re.fullmatch(r"\s*[$-]?\s*\d*\.?\d+(e-?\d+)?.*", value, re.IGNORECASE))
    else:
        yield isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _set_fields(request: Any) -> set[str]:
    standard = [("service_tier", "default"), ("service_tier", "standard"), ("speed", "standard")]
    if not isinstance(request, dict):
        return set()
    return {str(name) for name, value in request.items() if value is not None and (name, value) not in standard}


def _usd(value: Any, name: str) -> float:
    """An amount of the table, which some copies write as text; of several search sizes the dearest."""
    if isinstance(value, dict):
        return max((_usd(item, name) for item in value.values()), default=0.0)
    try:
        usd = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        usd = math.nan
    if not (math.isfinite(usd) and usd >= 0):
        raise ValueError(f"litellm's table has {name}: {value!r}, which is no price; {_YOURSELF}")
    return usd


def _tokens(value: Any, name: str) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and value == int(value):
        return int(value)
    raise ValueError(f"litellm's table has {name}: {value!r}, which is no number of tokens; {_YOURSELF}")


class _Twice(Exception):
    """A key of a JSON object that is written twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(repr(name))
        found[name] = value
    return found
