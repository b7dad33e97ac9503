"""The fields of a catalogue's member: what each may hold, and what to write where it holds something else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from routers.data.billing import HIGHEST_PRICE, HIGHEST_REQUEST, LOWEST_PRICE, PriceTier


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def _line(value: Any) -> str:
    text = _text(value)
    if "\n" in text:
        raise ValueError
    return text


def _url(value: Any) -> str:
    if not re.match(r"https?://[^/@\s?#]+(/[^\s?#]*)?$", _line(value)):  # no user:password@host, no ?key=...
        raise ValueError
    return _line(value)


def _variable(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", _line(value)) or _looks_like_a_key(value):
        raise ValueError
    return _line(value)


def _looks_like_a_key(value: str) -> bool:
    return bool(re.match(r"(sk|hf|gsk|nvapi|xai)[-_]", value)) or len(value) > 64


def _number(low: float, high: float = math.inf, above: bool = False) -> Callable[[Any], float]:
    def rule(value: Any) -> float:
        if isinstance(value, str):
            value = float(value)  # YAML 1.1 reads 1e-1 as text
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError
        if not low <= value <= high or (above and value == low):
            raise ValueError
        return float(value)

    return rule


def _price(value: Any) -> float:
    found = _number(0.0)(value)
    if found > HIGHEST_PRICE:
        raise ValueError(f"no model costs more than ${HIGHEST_PRICE:g} per million tokens")
    if 0 < found < LOWEST_PRICE:
        raise ValueError("this looks like a price per token")
    return found


def _tiers(value: Any) -> tuple[PriceTier, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    tiers = []
    for entry in value:
        if not isinstance(entry, dict) or not {"above", "price_in", "price_out"} <= entry.keys():
            raise ValueError("a tier needs above, price_in and price_out")
        known = [field.name for field in fields(PriceTier)]
        if unknown := [str(name) for name in entry if name not in known]:
            raise ValueError(f"a tier has no {unknown[0]!r}; it may have {', '.join(known)}")
        prices = {name: _price(price) for name, price in entry.items() if name != "above" and price is not None}
        tiers.append(PriceTier(_whole(entry["above"]), **prices))  # TypeError: price_in or price_out is null
    tiers.sort(key=lambda tier: tier.above)
    if len({tier.above for tier in tiers}) < len(tiers):
        raise ValueError("two tiers begin at the same number of tokens")
    return tuple(tiers)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError
    return value


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def _scores(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError
    return {_line(task): _number(0.0, 1.0)(score) for task, score in value.items()}


def _request(value: Any) -> dict[str, Any]:
    """More fields of the body; not those that change the question, or the form or number of the replies."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    if value.keys() & _NOT_IN_REQUEST:
        raise ValueError
    if not all(math.isfinite(leaf) for leaf in _numbers(value)):
        raise ValueError
    return dict(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _numbers(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _numbers(item)]
    return [value] if isinstance(value, float) else []


def _none_or_more(value: Any) -> int:
    return 0 if value == 0 and isinstance(value, int) and not isinstance(value, bool) else _whole(value)


_NOT_IN_REQUEST = {"model", "messages", "n", "best_of", "num_return_sequences", "candidate_count", "stream"}
LENGTH_FIELDS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length"),
    *("n_predict", "num_predict"),
)
"""What servers call the longest reply."""
LONGEST_CACHE = 7 * 24 * 3600.0
REQUIRED = ("name", "descriptor")
MAY_HOLD_A_KEY = ("api_key_env", "base_url", "request", "system")  # by mistake: such a value is never shown
_PRICE = (
    _price,
    "write a number >= 0 in USD per million tokens (0 if it is really free), or price_from: litellm:MODEL_KEY",
)
_POSITIVE = (_number(0.0, above=True), "write a number > 0")
_COUNT = (_whole, "write a whole number >= 1")
RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "name": (_line, "write one line of text"),
    "descriptor": (_line, "write one line of text"),
    "price_in": _PRICE,
    "price_out": _PRICE,
    "model": (_line, "write the model's name at the endpoint"),
    "base_url": (_url, "write the endpoint's address without a key, as https://host/v1"),
    "api_key_env": (_variable, "write the name of the environment variable that holds the key, never the key"),
    "context_length": _COUNT,
    "max_tokens": _COUNT,
    "temperature": (_number(0.0), "write a number >= 0"),
    "top_p": (_number(0.0, 1.0, above=True), "write a number in (0, 1]"),
    "seed": (_seed, "write a whole number"),
    "system": (_text, "write the system prompt, or leave it out"),
    "request": (
        _request,
        "write a mapping of body fields, without model, messages, stream, and n or another number of replies",
    ),
    "concurrency": _COUNT,
    "requests_per_second": _POSITIVE,
    "tokens_per_minute": _COUNT,
    "timeout": (_number(0.0, above=True), "write seconds > 0"),
    "latency": (_number(0.0), "write measured seconds"),
    "examples": (_scores, "write task: score with scores from 0 to 1"),
    "price_cached": _PRICE,
    "price_cache_write": _PRICE,
    "price_reasoning": _PRICE,
    "price_request": (_number(0.0, HIGHEST_REQUEST), "write USD per request, from 0 to 100"),
    "price_tiers": (_tiers, "write a list of {above: tokens of the prompt, price_in: USD, price_out: USD}"),
    "extra_prompt_tokens": (_none_or_more, "write a whole number >= 0"),
    "max_reasoning_tokens": (_none_or_more, "write a whole number >= 0"),
    "price_cache_write_1h": _PRICE,
    "price_cache_hour": (_price, "write a number >= 0 in USD per million tokens and hour"),
    "cache_seconds": (_number(0.0, LONGEST_CACHE, above=True), "write seconds > 0, at most a week: 300, 3600, 86400"),
    "cache_min_tokens": (_none_or_more, "write a whole number >= 0"),
    "cache_step_tokens": _COUNT,
}
