"""Which fields a chat request may have, and who deals with each: the one list that checking, docs and proxying read.

    OURS      what the server itself understands, beside OpenAI's fields
    PASSED    what a member gets as it came; an agent honours those in `AGENT_FIELDS` and refuses the others by name
    REFUSED   what nobody may send, with the reason

A field that stands in none of them is refused by its name; null is the same as leaving a field out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from routers.pool.request import LENGTHS

MOST_REPLIES = 16
"""``n``, at most; each of them is set aside for."""


class Field(NamedTuple):
    """A field of the body."""

    check: Callable[[Any], bool]
    must: str
    """Completes "'name' must be ...". """
    says: str = ""
    """What it is, for `/docs`."""


def is_number(low: float = -math.inf, high: float = math.inf) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return low <= value <= high and (isinstance(value, int) or math.isfinite(value))

    return check


def is_whole(low: int, high: int = 2**63 - 1) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= 16 and all(isinstance(text, str) and text for text in texts)


def is_tools(value: Any) -> bool:
    """Functions that the client runs. What a provider runs by itself costs money that nobody set aside."""
    return isinstance(value, list) and all(
        isinstance(tool, dict) and tool.get("type") in ("function", "custom") for tool in value
    )


def is_choice(value: Any) -> bool:
    return isinstance(value, (str, dict))


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole(0), value))


USD = Field(is_number(0, 1e9), "a number of US dollars >= 0", "hard cap of this request, the router's own tokens too")
OURS: dict[str, Field] = {
    "model": Field(is_text, "the router's name", "the router's name"),
    "stream": Field(is_switch, "true or false", "send the reply as it comes (server-sent events)"),
    "stream_options": Field(is_object, "an object", "{include_usage: true} sends usage and cost at the end"),
    "max_cost_usd": USD,
    "cost_weight": Field(is_number(0), "a number >= 0", "price sensitivity, where a router takes one"),
}
_TOKENS = Field(is_whole(1), "a whole number >= 1", "longest reply, in tokens")
_UNIT = "a number from -2 to 2"
PASSED: dict[str, Field] = {
    "messages": Field(lambda value: isinstance(value, list), "a list of messages", "the conversation"),
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "temperature": Field(is_number(0, 2), "a number from 0 to 2"),
    "top_p": Field(is_number(0, 1), "a number from 0 to 1"),
    "seed": Field(is_whole(-(2**63)), "a whole number"),
    "stop": Field(is_stop, "a text that is not empty, or a list of at most 16 of them"),
    "n": Field(is_whole(1, MOST_REPLIES), f"a whole number from 1 to {MOST_REPLIES}", "number of replies"),
    "tools": Field(is_tools, "a list of tools of type 'function' or 'custom'", "functions that the client runs"),
    "tool_choice": Field(is_choice, "a text or an object"),
    "parallel_tool_calls": Field(is_switch, "true or false"),
    "functions": Field(lambda value: isinstance(value, list), "a list", "OpenAI's old name for tools"),
    "function_call": Field(is_choice, "a text or an object"),
    "response_format": Field(is_object, "an object", "text, json_object or json_schema"),
    "presence_penalty": Field(is_number(-2, 2), _UNIT),
    "frequency_penalty": Field(is_number(-2, 2), _UNIT),
    "logit_bias": Field(is_object, "an object"),
    "logprobs": Field(is_switch, "true or false"),
    "top_logprobs": Field(is_whole(0, 100), "a whole number from 0 to 100"),
    "reasoning_effort": Field(is_text, "a text"),
    "verbosity": Field(is_text, "a text"),
    "user": Field(is_text, "a text"),
    "safety_identifier": Field(is_text, "a text"),
    "prompt_cache_key": Field(is_text, "a text"),
    "metadata": Field(is_object, "an object", "for the provider's records; conversation_id names a conversation"),
    "store": Field(is_switch, "true or false"),
    # of open servers (vLLM, SGLang, llama.cpp)
    "top_k": Field(is_whole(-1), "a whole number >= -1"),
    "min_p": Field(is_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": Field(is_number(0, 100), "a number from 0 to 100"),
    "min_tokens": Field(is_whole(0), "a whole number >= 0"),
    "stop_token_ids": Field(is_numbers, "a list of whole numbers >= 0"),
    "skip_special_tokens": Field(is_switch, "true or false"),
    "include_stop_str_in_output": Field(is_switch, "true or false"),
    "chat_template_kwargs": Field(is_object, "an object"),
    "thinking": Field(is_object, "an object"),
    "reasoning": Field(is_object, "an object"),
    "enable_thinking": Field(is_switch, "true or false"),
}
_PRICE = "it changes the price of a call, so it is for the operator to set, in the catalogue (request:)"
_UNBOUNDED = "what it costs cannot be bounded before the call"
REFUSED: dict[str, str] = {
    "service_tier": _PRICE,
    "prompt_cache_retention": _PRICE,
    "prediction": _UNBOUNDED,
    "audio": _UNBOUNDED,
    "modalities": "only text is served",
    "web_search_options": _UNBOUNDED,
    "plugins": _UNBOUNDED,
}
AGENT_FIELDS = ("messages", *LENGTHS, "temperature", "top_p", "seed", "stop", "n", "user", "metadata")
"""What a think/route agent honours. ``n`` must be 1; ``user`` and ``metadata`` are for records, and change nothing."""
