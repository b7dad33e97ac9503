"""The price list of the pool: who the members are, what one line says about them, their prices, where they live.

What prices mean, and all arithmetic with them, is in ``routers.data.billing``. A key is named by its environment
variable, and never stands in a catalogue.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routers.data.billing import PriceTier
from routers.data.billing import cost as cost  # the public name
from routers.data.catalogue_fields import LENGTH_FIELDS, MAY_HOLD_A_KEY, REQUIRED, RULES
from routers.data.prices import litellm_fields, litellm_table
from srpo.redact import credential_in, redacted, scrubbed
from srpo.strict_yaml import read_yaml


@dataclass(frozen=True)
class Member:
    """One pool member. Prices as in ``routers.data.billing``: finite and not negative.

    The fields after the prices matter to live members, and ``latency`` and ``examples`` to prompts.

    Raises:
        ValueError: a price that is negative or not a number, or further prices without ``price_in`` and ``price_out``.
    """

    name: str
    descriptor: str
    price_in: float | None = None
    """None: none is known, which recorded replies with a cost of their own can do without."""
    price_out: float | None = None
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
    price_cached: float | None = None
    price_cache_write: float | None = None
    price_reasoning: float | None = None
    price_request: float = 0.0
    """USD per request."""
    price_tiers: tuple[PriceTier, ...] = ()
    extra_prompt_tokens: int = 0
    """That the provider adds to every prompt and bills, such as a system prompt of its own, at most."""
    max_reasoning_tokens: int | None = None
    """Reasoning that the endpoint does not count in ``max_tokens``, at most; reservations count with it too. None: not
    known (``routers.pool.usage`` says what is believed then)."""
    price_cache_write_1h: float | None = None
    price_cache_hour: float = 0.0
    """USD per million tokens and hour."""
    cache_seconds: float | None = None
    """How long the provider keeps a prompt after it was last sent; from an hour on, writes are billed as long ones.
    None: nothing is counted on being cached (``routers.data.prompt_cache``)."""
    cache_min_tokens: int = 0
    """A shorter beginning of a prompt is not cached."""
    cache_step_tokens: int = 1
    """Only a multiple of so many tokens is cached."""

    def __post_init__(self) -> None:
        stated = (self.price_in, self.price_out)
        cached = (self.price_cached, self.price_cache_write, self.price_cache_write_1h, self.price_cache_hour or None)
        further = (*cached, self.price_reasoning, self.price_request or None)
        tiers = [value for tier in self.price_tiers for value in vars(tier).values()]
        if any(p is not None and not (math.isfinite(p) and p >= 0) for p in (*stated, *further, *tiers)):
            raise ValueError(f"member {self.name!r}: prices are finite numbers >= 0, in USD")
        if stated.count(None) == 1 or (None in stated and (self.price_tiers or any(p is not None for p in further))):
            raise ValueError(f"member {self.name!r}: write price_in and price_out, in USD per million tokens")

    @property
    def priced(self) -> bool:
        """Whether tokens of this member have a price."""
        return self.price_in is not None and self.price_out is not None

    @property
    def free_tokens(self) -> bool:
        """Whether no number of tokens costs anything; there may be a price per request."""
        prices = [self.price_in, self.price_out, self.price_cached or 0, self.price_cache_write or 0]
        prices += [self.price_reasoning or 0, self.price_cache_write_1h or 0, self.price_cache_hour]
        tiers = [price or 0 for tier in self.price_tiers for name, price in vars(tier).items() if name != "above"]
        return not any(price is None or price > 0 for price in (*prices, *tiers))

    @property
    def token_prices(self) -> str:
        """What prompts show, ``$0.1/0.4``: USD per million tokens, in and out; ``$0.01/call`` where only calls cost;
        empty where there are none."""
        if self.free_tokens and self.price_request:
            return f"${self.price_request:g}/call"
        return f"${self.price_in:g}/{self.price_out:g}" if self.priced else ""


def describe(member: Member) -> str:
    """One line for a policy's prompt: the descriptor, then price, latency and example scores as far as known.

    Router-R1 claims that these are what lets a policy route to members that it never saw, but leaves them out of its
    shipped prompts. Tasks stand in alphabetical order, so that a catalogue's line order changes no prompt.
    """
    facts = [f"{member.token_prices} per 1M tokens"] if member.priced and "/call" not in member.token_prices else []
    if member.price_request:
        facts.append(f"${member.price_request:g} per call")
    if member.latency is not None:
        facts.append(f"{member.latency:.2g} s")
    if member.examples:
        facts.append(", ".join(f"{task} {score:.2f}" for task, score in sorted(member.examples.items())))
    return f"{member.descriptor} ({'; '.join(facts)})" if facts else member.descriptor


_SHARED = (
    *("name", "descriptor", "price_in", "price_out", "price_cached", "price_cache_write", "price_reasoning"),
    *("price_request", "price_tiers", "context_length", "max_tokens", "latency", "examples"),
    *("price_cache_write_1h", "price_cache_hour", "cache_seconds", "cache_min_tokens", "cache_step_tokens"),
)
"""Fields that go into a checkpoint's files, and so to the Hub: what a policy was told and what calls cost. Addresses,
names of keys, system prompts and request fields are the user's own."""


def shared_fields(member: Member) -> dict[str, Any]:
    """A member as a checkpoint's files have it, plain data; `shared_member` is the inverse."""
    document = {name: value for name, value in asdict(member).items() if name in _SHARED}
    return redacted({**document, "price_tiers": list(document["price_tiers"])})


def shared_member(document: Mapping[str, Any]) -> Member:
    """The member of `shared_fields`. A file that others wrote says nothing about addresses and keys.

    Raises:
        ValueError: not such a document; names the member and the field.
    """
    if unknown := [str(name) for name in document if name not in _SHARED]:
        raise ValueError(f"unknown key {unknown[0]!r}; a member has {', '.join(_SHARED)}")
    return _member({name: value for name, value in document.items() if value not in (None, [], {})}, "members", 0)


def load_catalogue(path: str | Path, prices: Mapping[str, Any] | None = None) -> dict[str, Member]:
    """Read a catalogue YAML into ``{name: Member}``, in file order.

    ``members:`` is a list of mappings with the fields of ``Member``. Instead of prices a member may say
    ``price_from: litellm:MODEL_KEY``; ``price_table: FILE`` beside ``members:`` (relative to the catalogue) is then
    litellm's table, or else the copy in an installed litellm (``routers.data.prices``).

    Args:
        path: of the catalogue.
        prices: litellm's table in place of both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the file, the member, the field and what to do.
    """
    path = Path(path)
    document = read_catalogue(path)
    table = price_table(path, document)
    read = functools.cache(lambda: litellm_table(table) if prices is None else prices)  # once, and only if it is asked
    members: dict[str, Member] = {}
    for position, entry in enumerate(document["members"]):
        member = read_member(entry, read, path, position)
        if member.name in members:
            raise ValueError(f"{path}: member {member.name!r} is listed twice; rename or remove one entry")
        members[member.name] = member
    return members


def member_names(words: Iterable[str], known: Collection[str]) -> list[str]:
    """Members as a command line names them: a word is a name that is known, or several with commas between."""
    parts = (part for word in words for part in ([word] if word in known else word.split(",")))
    return list(dict.fromkeys(part if part in known else part.strip() for part in parts))


def read_catalogue(path: Path) -> dict[str, Any]:
    """The mapping that a catalogue's file holds, with its list of `members`, which are not looked at.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names the file and what to do.
    """
    document = read_yaml(path)
    if not isinstance(document, dict) or not isinstance(document.get("members"), list):
        raise ValueError(f"{path}: write one top-level key 'members' that holds a list of members")
    unknown = sorted(str(key) for key in document.keys() - {"members", "price_table"})
    if unknown:
        raise ValueError(f"{path}: unknown top-level key {unknown[0]!r}; there are 'members' and 'price_table'")
    if not document["members"]:
        raise ValueError(f"{path}: 'members' is empty; list at least one member")
    return document


def price_table(path: Path, document: Mapping[str, Any]) -> Path | None:
    """The file of prices that a catalogue names; None: it names none."""
    name = document.get("price_table")
    return None if name is None else path.parent / name


def read_member(entry: Any, table: Callable[[], Mapping[str, Any]], path: Path, position: int) -> Member:
    """One entry of a catalogue's `members`; `table`: litellm's, asked for where the entry says `price_from`.

    Raises:
        ValueError: names the file, the member, the field and what to do.
    """
    return _member(_priced(entry, table, path, position), path, position)


def _label(entry: dict[str, Any], path: Path | str, position: int) -> str:
    name = entry.get("name", f"number {position}")
    return f"{path}: member {'with a key in its name' if credential_in('name', name) else repr(name)}"


def _priced(entry: Any, table: Callable[[], Mapping[str, Any]], path: Path, position: int) -> Any:
    """The entry with ``price_from`` replaced by prices; a price that stands in the entry wins."""
    if not isinstance(entry, dict) or "price_from" not in entry:
        return entry
    label = f"{_label(entry, path, position)}: field 'price_from' is {scrubbed(repr(entry['price_from']))}"
    kind, _, key = str(entry["price_from"]).partition(":")
    try:
        if kind != "litellm" or not key:
            raise ValueError("write litellm:MODEL_KEY")
        own = {name: value for name, value in entry.items() if name != "price_from"}
        found = litellm_fields(table(), key, own)
    except ValueError as error:
        raise ValueError(f"{label}; {error}") from error
    return {**found, **own}


def _member(entry: Any, path: Path | str, position: int) -> Member:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: entry {position} of 'members' is not a mapping; write {', '.join(REQUIRED)}")
    label = _label(entry, path, position)
    unknown = [str(key) for key in entry if key not in RULES]
    if unknown:
        raise ValueError(
            f"{label}: unknown field {scrubbed(unknown[0])!r}; the fields are {', '.join(RULES)}, price_from"
        )
    for name in REQUIRED:
        if entry.get(name) is None:
            raise ValueError(f"{label}: field {name!r} is missing or null; {RULES[name][1]}")
    for name, other in (("price_in", "price_out"), ("price_out", "price_in")):
        if entry.get(name) is None and (name in entry or entry.get(other) is not None):
            raise ValueError(f"{label}: field {name!r} is missing or null; {RULES[name][1]}")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        where = None if name == "api_key_env" else credential_in(name, value)
        rule, advice = RULES[name]
        if value is not None:
            try:
                values[name] = rule(value)
            except (TypeError, ValueError, OverflowError) as error:
                hidden = where is not None or name in MAY_HOLD_A_KEY
                found = "not usable" if hidden else f"{value!r} ({error})" if str(error) else repr(value)
                raise ValueError(f"{label}: field {name!r} is {found}; {advice}") from None
        if where is not None:
            raise ValueError(
                f"{label}: field {name!r} holds what looks like a key or a header, at {scrubbed(where)}; neither "
                "stands in a catalogue: export the key and name its environment variable as api_key_env"
            )
    try:
        member = Member(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if member.context_length is not None and member.max_tokens >= member.context_length:
        raise ValueError(
            f"{label}: max_tokens {member.max_tokens} leaves no room for a prompt in context_length "
            f"{member.context_length}; lower max_tokens"
        )
    sent = {"max_tokens": member.max_tokens, **member.request}
    limits = [sent[key] for key in LENGTH_FIELDS if sent.get(key) is not None]
    if not limits or any(limit != member.max_tokens for limit in limits):  # else a reservation would be no upper bound
        raise ValueError(
            f"{label}: field 'request' changes the longest reply; set it by max_tokens alone. For an endpoint that "
            "wants the newer name write request: {max_tokens: null, max_completion_tokens: N}, with N = max_tokens"
        )
    return member
