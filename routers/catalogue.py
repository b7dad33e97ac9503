"""The price list of the pool: who the members are, what one line says about them, what a token costs, where they live.

Prices are USD per million tokens, as API vendors quote them. ``cost`` is the one place that turns tokens into
dollars; nothing else in the repository multiplies a price. A key is named by its environment variable, and never
stands in a catalogue.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routers.prices import litellm_fields, litellm_table
from srpo.strict_yaml import read_yaml

TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True)
class Member:
    """One pool member. Prices are USD per million tokens, finite and not negative.

    The fields after the prices matter to live members, and those from ``latency`` on to prompts.
    """

    name: str
    descriptor: str
    price_in: float
    price_out: float
    model: str | None = None
    """What the endpoint calls the model; None: the name."""
    base_url: str | None = None
    """Of an OpenAI-compatible endpoint, with its ``/v1``."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: the endpoint wants none."""
    context_length: int | None = None
    """Tokens of prompt and reply together."""
    max_tokens: int = 512
    """Longest reply; sent with every call, and what a reservation counts with."""
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    system: str | None = None
    """System prompt; None: none is sent."""
    request: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """More fields of the request's body, as the endpoint knows them; null leaves one out that we would send."""
    concurrency: int = 16
    """Calls in flight at once, per process."""
    requests_per_second: float | None = None
    tokens_per_minute: int | None = None
    """Prompt and reply, counted by what was used."""
    timeout: float = 60.0
    """Seconds of one attempt."""
    latency: float | None = None
    """Measured seconds of a typical call."""
    examples: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Score per task, 0 to 1."""


def cost(member: Member, prompt_tokens: int, completion_tokens: int) -> float:
    """Price of one reply in USD: every prompt token at ``price_in``, every completion token at ``price_out``.

    Raises:
        ValueError: a token count is negative.
    """
    if prompt_tokens < 0 or completion_tokens < 0:
        raise ValueError(f"{member.name}: token counts are negative ({prompt_tokens}, {completion_tokens})")
    return (prompt_tokens * member.price_in + completion_tokens * member.price_out) / TOKENS_PER_PRICE


def describe(member: Member) -> str:
    """One line for a policy's prompt: the descriptor, then price, latency and example scores as far as known.

    Router-R1 claims that these are what lets a policy route to members that it never saw, but leaves them out of its
    shipped prompts. Tasks stand in alphabetical order, so that a catalogue's line order changes no prompt.
    """
    facts = [f"${member.price_in:g}/{member.price_out:g} per 1M tokens"]
    if member.latency is not None:
        facts.append(f"{member.latency:.2g} s")
    if member.examples:
        facts.append(", ".join(f"{task} {score:.2f}" for task, score in sorted(member.examples.items())))
    return f"{member.descriptor} ({'; '.join(facts)})"


def load_catalogue(path: str | Path) -> dict[str, Member]:
    """Read a catalogue YAML into ``{name: Member}``, in file order.

    ``members:`` is a list of mappings with the fields of ``Member``. Instead of prices a member may say
    ``price_from: litellm:MODEL_KEY``; ``price_table: FILE`` beside ``members:`` (relative to the catalogue) is then
    litellm's table, or else the copy in an installed litellm (``routers.prices``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the file, the member, the field and what to do.
    """
    path = Path(path)
    document = read_yaml(path)
    if not isinstance(document, dict) or not isinstance(document.get("members"), list):
        raise ValueError(f"{path}: write one top-level key 'members' that holds a list of members")
    unknown = sorted(str(key) for key in document.keys() - {"members", "price_table"})
    if unknown:
        raise ValueError(f"{path}: unknown top-level key {unknown[0]!r}; there are 'members' and 'price_table'")
    if not document["members"]:
        raise ValueError(f"{path}: 'members' is empty; list at least one member")
    members: dict[str, Member] = {}
    for position, entry in enumerate(document["members"]):
        member = _member(_priced(entry, document.get("price_table"), path, position), path, position)
        if member.name in members:
            raise ValueError(f"{path}: member {member.name!r} is listed twice; rename or remove one entry")
        members[member.name] = member
    return members


def _label(entry: dict[str, Any], path: Path, position: int) -> str:
    return f"{path}: member {entry.get('name', f'number {position}')!r}"


def _priced(entry: Any, table: str | None, path: Path, position: int) -> Any:
    """The entry with ``price_from`` replaced by prices; a price that stands in the entry wins."""
    if not isinstance(entry, dict) or "price_from" not in entry:
        return entry
    kind, _, key = str(entry["price_from"]).partition(":")
    try:
        if kind != "litellm" or not key:
            raise ValueError("write litellm:MODEL_KEY")
        found = litellm_fields(litellm_table(None if table is None else path.parent / table), key)
    except ValueError as error:
        label = f"{_label(entry, path, position)}: field 'price_from' is {entry['price_from']!r}"
        raise ValueError(f"{label}; {error}") from error
    return {**found, **{name: value for name, value in entry.items() if name != "price_from"}}


def _member(entry: Any, path: Path, position: int) -> Member:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: entry {position} of 'members' is not a mapping; write {', '.join(_REQUIRED)}")
    label = _label(entry, path, position)
    unknown = [str(key) for key in entry if key not in _RULES]
    if unknown:
        raise ValueError(f"{label}: unknown field {unknown[0]!r}; the fields are {', '.join(_RULES)}, price_from")
    for name in _REQUIRED:
        if entry.get(name) is None:
            raise ValueError(f"{label}: field {name!r} is missing or null; {_RULES[name][1]}")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        rule, advice = _RULES[name]
        if value is not None:
            try:
                values[name] = rule(value)
            except (TypeError, ValueError):
                found = "not usable" if name in _MAY_HOLD_A_KEY else repr(value)
                raise ValueError(f"{label}: field {name!r} is {found}; {advice}") from None
    member = Member(**values)
    if member.context_length is not None and member.max_tokens >= member.context_length:
        raise ValueError(
            f"{label}: max_tokens {member.max_tokens} leaves no room for a prompt in context_length "
            f"{member.context_length}; lower max_tokens"
        )
    sent = {"max_tokens": member.max_tokens, **member.request}
    limits = [sent[key] for key in ("max_tokens", "max_completion_tokens") if sent.get(key) is not None]
    if set(limits) != {member.max_tokens}:  # else a reservation would be no upper bound
        raise ValueError(
            f"{label}: field 'request' changes the longest reply; set it by max_tokens alone. For an endpoint that "
            "wants the newer name write request: {max_tokens: null, max_completion_tokens: N}, with N = max_tokens"
        )
    return member


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
    if not re.match(r"https?://[^/@\s]+(/\S*)?$", _line(value)):  # no user:password@host
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
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError
        if not low <= value <= high or (above and value == low):
            raise ValueError
        return float(value)

    return rule


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
    """More fields of the body; not those that change the question, or the form of the reply."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError
    if value.keys() & {"model", "messages", "n", "stream"}:
        raise ValueError
    return dict(value)


_REQUIRED = ("name", "descriptor", "price_in", "price_out")
_MAY_HOLD_A_KEY = ("api_key_env", "base_url", "request")  # by mistake: such a value is never shown
_PRICE = (
    _number(0.0),
    "write a number >= 0 in USD per million tokens (0 if it is really free), or price_from: litellm:MODEL_KEY",
)
_POSITIVE = (_number(0.0, above=True), "write a number > 0")
_COUNT = (_whole, "write a whole number >= 1")
_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
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
    "request": (_request, "write a mapping of body fields, without model, messages, n and stream"),
    "concurrency": _COUNT,
    "requests_per_second": _POSITIVE,
    "tokens_per_minute": _COUNT,
    "timeout": (_number(0.0, above=True), "write seconds > 0"),
    "latency": (_number(0.0), "write measured seconds"),
    "examples": (_scores, "write task: score with scores from 0 to 1"),
}
