"""OpenAI's responses API, without state, as chat: what a request means, and what a reply looks like.

A request becomes a chat request: instructions and items become messages, function tools and their results keep their
names and ids. What needs state or a tool of the provider's (previous_response_id, conversation, background, store:
true, web_search, ...) is refused by name. Reasoning items of earlier replies are left out of the conversation: their
text is for people, and members take none; a client may send them back as it got them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from routers.serving.chat import shown
from routers.serving.errors import RequestError
from routers.serving.fields import PASSED, REFUSED

_STATELESS = "this server keeps nothing"
_REFUSED = {
    "previous_response_id": f"{_STATELESS}: send the whole conversation as input",
    "conversation": f"{_STATELESS}: send the whole conversation as input",
    "prompt": f"{_STATELESS}: send the prompt's text as instructions",
    "background": f"{_STATELESS}: a reply is waited for",
    "include": "it adds nothing to a reply",
    "max_tool_calls": "there are no tools of the server's",
    "top_logprobs": "use /v1/chat/completions for log-probabilities",
    "context_management": _STATELESS,
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "store": (False,),
    "truncation": ("disabled",),
    "include": ([], ["reasoning.encrypted_content"]),
    "service_tier": ("auto", "default"),
    "top_logprobs": (0,),
}
"""Values that ask for what is done anyway. There is no encrypted reasoning, so that none can be left out."""
_SAME = (
    *("model", "stream", "max_cost_usd", "cost_weight", "temperature", "top_p", "parallel_tool_calls", "metadata"),
    *("user", "safety_identifier", "prompt_cache_key"),
)
"""Fields that mean the same in both."""


def chat_of(document: Any) -> dict[str, Any]:
    """The body of a chat request that says the same.

    Raises:
        RequestError: 400, with the field that is wrong or not served.
    """
    if not isinstance(document, dict):
        raise RequestError(400, "the body must be a JSON object")
    chat: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    for name, value in document.items():
        if value is None or value in _HARMLESS.get(name, ()):
            continue
        if name in _REFUSED or name in REFUSED:
            why = _REFUSED.get(name) or REFUSED[name]
            raise RequestError(400, f"{name!r} is not served: {why}", name, "unsupported_parameter")
        if name in _SAME:
            chat[name] = value
        elif name == "max_output_tokens":
            chat["max_completion_tokens"] = _checked(value, "max_completion_tokens", name)
        elif name == "tools":
            tools = [_tool(tool, place) for place, tool in enumerate(_list(value, name))]
        elif name == "tool_choice":
            chat["tool_choice"] = _choice(value)
        elif name == "text":
            chat |= _text(_object(value, name))
        elif name == "reasoning":
            chat |= _reasoning(_object(value, name))
        elif name == "stream_options":
            _only(_object(value, name), name, include_obfuscation=(False,))
        elif name == "store":
            raise RequestError(400, f"'store' must be false: {_STATELESS}", name, "unsupported_parameter")
        elif name == "truncation":
            raise RequestError(400, "'truncation' must be 'disabled'", name, "unsupported_parameter")
        elif name not in ("input", "instructions"):
            raise RequestError(400, f"there is no field {shown(name)}", name[:80], "unknown_parameter")
    if tools:
        chat["tools"] = tools
    chat["messages"] = _messages(document.get("instructions"), document.get("input"))
    if chat.get("stream") is True:
        chat["stream_options"] = {"include_usage": True}
    return chat


def _messages(instructions: Any, given: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        if not isinstance(instructions, str):
            raise RequestError(400, "'instructions' must be a text", "instructions", "invalid_value")
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for place, item in enumerate(_list(given, "input")):
        _add(messages, _object(item, f"input[{place}]"), f"input[{place}]")
    return messages


def _add(messages: list[dict[str, Any]], item: dict[str, Any], here: str) -> None:
    """An item as a message; calls of tools join the assistant's message before them."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), f"{here}.content")})
    elif kind == "function_call":
        called = {"name": _string(item, "name", here), "arguments": _string(item, "arguments", here)}
        call = {"id": _string(item, "call_id", here), "type": "function", "function": called}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content(item.get("output"), f"{here}.output")
        messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", here), "content": content})
    elif kind != "reasoning":
        words = f"{here}: an item of type {shown(kind)} is not served"
        raise RequestError(400, words, f"{here}.type", "unsupported_parameter")


def _content(value: Any, here: str) -> Any:
    if isinstance(value, str):
        return value
    parts = []
    for number, part in enumerate(_list(value, here)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
        else:
            words = f"{here}[{number}]: a part of type {shown(kind)}; only text is served, whose cost has a bound"
            raise RequestError(400, words, f"{here}[{number}]", "unsupported_content")
    return parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts


def _tool(tool: Any, place: int) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        words = f"tools[{place}]: a tool of type {shown(kind)} is not served; only functions that the client runs"
        raise RequestError(400, words, f"tools[{place}].type", "unsupported_parameter")
    known = ("name", "description", "parameters", "strict")
    if other := [name for name in tool if name not in ("type", *known)]:
        raise RequestError(400, f"tools[{place}] has no field {shown(other[0])}", "tools", "unknown_parameter")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return {"type": "function", "function": {"name": value.get("name")}}
    raise RequestError(400, "'tool_choice' must be a text, or a function by name", "tool_choice", "invalid_value")


def _text(value: dict[str, Any]) -> dict[str, Any]:
    _only(value, "text", format=None, verbosity=None)
    found = {} if value.get("verbosity") is None else {"verbosity": value["verbosity"]}
    form = value.get("format")
    if form is None or form == {"type": "text"}:
        return found
    if isinstance(form, dict) and form.get("type") == "json_schema":
        schema = {name: one for name, one in form.items() if name != "type"}
        return {**found, "response_format": {"type": "json_schema", "json_schema": schema}}
    return {**found, "response_format": form}


def _reasoning(value: dict[str, Any]) -> dict[str, Any]:
    _only(value, "reasoning", effort=None, summary=(None, "auto"), generate_summary=(None, "auto"))
    return {} if value.get("effort") is None else {"reasoning_effort": value["effort"]}


def _only(value: Mapping[str, Any], here: str, **known: tuple[Any, ...] | None) -> None:
    """RequestError for other names than these, and for other values where some are listed."""
    for name, one in value.items():
        if name not in known or (known[name] is not None and one not in (known[name] or ())):
            words = f"{here}.{name}: {shown(one)} is not served"
            raise RequestError(400, words, f"{here}.{name}"[:80], "unsupported_parameter")


def _checked(value: Any, field: str, name: str) -> Any:
    if not PASSED[field].check(value):
        raise RequestError(400, f"{name!r} must be {PASSED[field].must}", name, "invalid_value")
    return value


def _list(value: Any, here: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(400, f"{here!r} must be a text or a list", here, "invalid_value")
    return value


def _object(value: Any, here: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(400, f"{here!r} must be an object", here, "invalid_value")
    return value


def _string(item: Mapping[str, Any], name: str, here: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(400, f"{here}.{name} must be a text", f"{here}.{name}", "invalid_value")
    return item[name]
