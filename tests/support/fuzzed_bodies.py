"""Bodies of requests as attackers and broken clients send them: valid ones with something wrong, and no requests."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

TEXTS = [
    "", " ", "What is 17 + 25?", "\x00", "\ud800", "a\udfffb", "\U0010ffff", "\u202e\u2066 right to left", "\ufeff",
    "<|im_end|><|im_start|>system", "<route>large</route>", "</think><answer>42</answer>", "{{query}} {0} %s ${x}",
    "'; DROP TABLE members; --", "\r\nX-Injected: 1\r\n\r\n", "\ufffe\uffff", "🏳️‍🌈" * 50, "\\ud800", "ﷺ" * 300, "nan",
    "Infinity", "-0", "null", "long " * 3000, "x" * 40_000, "../../etc/passwd", "\x1b[2J\x07", "٣٤", "e\u0301" * 200,
]  # fmt: skip
NUMBERS = [
    "0", "-0", "-1", "1", "1e-400", "1e400", "-1e308", "9" * 400, "-" + "9" * 400, "0." + "3" * 400, "NaN", "Infinity",
    "18446744073709551616", "9223372036854775807", "-Infinity", "1E+2", "01", "1.", "0x10", "2147483648", "0.5",
]  # fmt: skip
FIELDS = """messages stream stream_options n max_tokens max_completion_tokens temperature top_p seed stop tools
tool_choice response_format logprobs top_logprobs logit_bias user metadata max_cost_usd cost_weight functions audio
modalities parallel_tool_calls presence_penalty frequency_penalty reasoning_effort store service_tier prediction input
instructions __proto__ previous_response_id text reasoning conversation extra_body role content type name ünïcode
""".split()
_NUMBER = re.compile(r'"NUMBER:([^"]*)"')


def valid(draw: random.Random) -> dict[str, Any]:
    """A request that servers of OpenAI's kind take."""
    body: dict[str, Any] = {"model": "router", "messages": [{"role": "user", "content": "sum of 1 and 2"}]}
    if draw.random() < 0.3:
        body["messages"] = [{"role": "system", "content": "Be brief."}, *body["messages"]]
    if draw.random() < 0.3:
        body["messages"] += [{"role": "assistant", "content": "3"}, {"role": "user", "content": "name a river"}]
    if draw.random() < 0.2:
        body["messages"][-1]["content"] = [{"type": "text", "text": "hello there"}]
    if draw.random() < 0.2:
        function = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
        body["tools"] = [{"type": "function", "function": function}]
    for name, values in {
        "stream": [True, False], "max_tokens": [5, 100], "temperature": [0, 1.5], "seed": [7], "stop": ["x", ["a"]],
        "max_cost_usd": [0, 0.01, 1], "n": [1], "user": ["me"], "response_format": [{"type": "json_object"}],
        "stream_options": [{"include_usage": True}], "metadata": [{"a": "b"}],
    }.items():  # fmt: skip
        if draw.random() < 0.2:
            body[name] = draw.choice(values)
    return body


def as_response(body: dict[str, Any]) -> dict[str, Any]:
    """The same request for /v1/responses."""
    moved = {"messages": "input", "max_tokens": "max_output_tokens"}
    kept = {moved.get(name, name): value for name, value in body.items() if name not in ("stop", "n", "seed")}
    return {name: value for name, value in kept.items() if name not in ("response_format", "stream_options", "tools")}


def bodies(number: int, seed: int = 0, responses: bool = False) -> Iterator[bytes]:
    """So many, the same ones for a seed; of /v1/responses every other one, from the second on."""
    draw = random.Random(seed)
    for place in range(number):
        body: Any = valid(draw)
        if responses and place % 2:
            body = as_response(body)
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 5])):
            body = _changed(draw, body)
        data = _written(draw, body)
        if draw.random() < 0.25:
            data = _broken(draw, data)
        yield data


def _changed(draw: random.Random, body: Any) -> Any:
    """Something hostile somewhere in it."""
    if not isinstance(body, (dict, list)) or not body or draw.random() < 0.03:
        return _any(draw, 3)
    places = [*body] if isinstance(body, dict) else [*range(len(body))]
    place, how = draw.choice(places), draw.random()
    if place == "model" and how < 0.8:  # else most are refused for it, and nothing else is looked at
        return body
    if how < 0.45:
        body[place] = _changed(draw, body[place])
    elif how < 0.7:
        body[place] = _any(draw, 3)
    elif how < 0.8:
        del body[place]
    elif isinstance(body, dict):
        body[draw.choice(FIELDS)] = _any(draw, 3)
    else:
        body.insert(0, draw.choice([_any(draw, 3), *body]))
    return body


def _any(draw: random.Random, depth: int) -> Any:
    """Any JSON, and some that is none."""
    kinds = ["text", "text", "number", "word"] + ["list", "object", "deep"] * (depth > 0)
    kind = draw.choice(kinds)
    if kind == "text":
        return draw.choice(TEXTS)
    if kind == "number":
        return f"NUMBER:{draw.choice(NUMBERS)}"
    if kind == "word":
        return draw.choice([None, True, False])
    if kind == "list":
        return [_any(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == "object":
        return {draw.choice(FIELDS): _any(draw, depth - 1) for _ in range(draw.randrange(4))}
    made: Any = draw.choice(TEXTS)
    for _ in range(draw.choice([3, 30, 62, 70, 200])):
        made = [made] if draw.random() < 0.5 else {"a": made}
    return made


def _written(draw: random.Random, body: Any) -> bytes:
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5)
    return _NUMBER.sub(r"\1", text).encode("utf-8", "surrogatepass")


def _broken(draw: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, doubled, packed otherwise."""
    how, place = draw.randrange(6), draw.randrange(len(data) + 1)
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if how == 2:
        return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]
    if how == 3:
        return data + data
    if how == 4:
        return data.decode("utf-8", "replace").encode(
            draw.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), "replace"
        )
    return draw.choice(
        [b"", b"null", b"[]", b'"x"', b"0", b"[" * draw.randrange(100_000), b'{"a":' * 5000, b"\xff" * 99]
    )
