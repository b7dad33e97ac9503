"""What a router does, however it was made, and how it is found again.

    from routers import load_router
    with load_router("outputs/quickstart/router") as router:         # a folder, or a Hub id
        decision = router.route("What is 17 + 25?")
        print(decision.member, decision.scores, decision.usd)

Beside every policy, in every checkpoint and on the Hub lies `router.yaml`, which says everything but the weights:

    kind: query_routing        # whose `settings` these are: a key of `KINDS`
    srpo: 0.2.0                # version that wrote it
    made_from: {...}           # hashes of the data and prices that it was trained with
    settings: {...}            # members with prices, grammar, prompt, budget: the kind's own dataclass

A kind's class is imported when a router of it is loaded, so this module stays free of torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from routers.data.catalogue import Member, load_catalogue, shared_fields, shared_member
from srpo.redact import redacted
from srpo.strict_yaml import read_yaml
from srpo.types import Stop, Trajectory

ROUTER_FILE = "router.yaml"

KINDS = {
    "query_routing": "routers.tasks.query_routing.router:QueryRouter",
    "think_route": "routers.tasks.think_route.agent:RouterAgent",
    "step_routing": "routers.tasks.step_routing.router:StepRouter",
    "step_rule": "routers.tasks.step_routing.rule_router:RuleRouter",
    "fitted": "routers.baselines.base:Fitted",
    "encoder_routing": "routers.tasks.query_routing.encoder.router:EncoderRouter",
    "online": "routers.baselines.online:OnlineRouter",
}
"""Kind -> its class, a `Router` with `load(name, file, members=, catalogue=, **options)`. Named, not imported: the
tasks import this module."""

Settings = TypeVar("Settings")


class CannotDo(ValueError):
    """A kind of router was asked for what it does not do."""


@dataclass(frozen=True)
class Decision:
    """Whom a query goes to."""

    members: tuple[str, ...]
    """The choice, one member, also where it stands for a set (`a+b` of `srpo convert sets`); none: it abstains."""
    scores: Mapping[str, float]
    """Probability of each member of the pool; they sum to 1. Empty where a kind has none."""
    usd: float | None = None
    """Expected cost of the calls, without the router's own; None: there is no price, or no typical length, to say."""
    policy_usd: float = 0.0
    """What the decision itself cost, at the router's own token prices."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """That the policy read and wrote."""
    text: str = ""
    """What the policy wrote, where it writes."""
    error: str = ""
    """Why there is no member, where there is none."""

    @property
    def member(self) -> str | None:
        """The first of `members`; None: it abstains."""
        return self.members[0] if self.members else None


@dataclass(frozen=True)
class Answer:
    """What became of a question that a router had answered."""

    answer: str | None
    """None: there is none; `stop` says why."""
    stop: Stop
    error: str | None
    """Why the pool failed, where `stop` is "lost"."""
    cost_usd: float
    """Members' tokens at catalogue prices, and the policy's own where they have a price."""
    members: tuple[str, ...]
    """Who was asked, in order."""
    prompt_tokens: int
    """That the policy read: its prompt and the observations."""
    completion_tokens: int
    """That the policy wrote."""
    turns: tuple[tuple[str, str], ...]
    """(owner, text) of every turn: "policy" or "world"."""
    trajectory: Trajectory | None = None
    """Of an agent that took turns."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of one decision: probability of each member."""


OnTurn = Callable[[str], None]
"""Called with the text of every turn of the policy, as soon as it is written. An exception ends the episode."""


class Router:
    """The one face of trained, fitted and fixed routers. A kind overrides what it can do; the rest raises `CannotDo`.

    Routers may hold threads and connections: close them, or use them as context managers.
    """

    kind: str = ""
    name: str = "router"
    cost_weights: Sequence[float] = ()
    """Price sensitivities that it was trained with; `route` takes any between the lowest and the highest of them."""

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """Decide who gets a query. Asks nobody but the policy.

        Args:
            query: any text.
            context: what a kind needs beside the query (a step router: the episode so far).
            cost_weight: how much price matters, for routers that take it; None: as trained.
            members: choose among these only.

        Raises:
            CannotDo: this kind does not route queries, or not with these arguments.
        """
        raise self._cannot("route a single query")

    def count_tokens(self, text: str) -> int:
        """Tokens of a query as the policy reads it, from any thread. A kind without a tokenizer takes four characters
        for one."""
        return -(-len(text) // 4)

    def fit(self, table: Any, split: str = "train", **how: Any) -> Router:
        """Learn from recorded replies (`routers.data.table.ReplyTable`); returns itself."""
        raise self._cannot("be fitted to a table (a policy is trained by `srpo train`)")

    def update(self, query: str, decision: Decision, outcome: Mapping[str, float]) -> None:
        """Learn from what became of a decision."""
        raise self._cannot("learn online")

    def save(self, folder: str | Path) -> None:
        """Write everything that `load_router` needs into a folder."""
        raise self._cannot("be saved")

    def close(self) -> None:
        """Give back threads and connections."""

    async def aclose(self) -> None:
        """`close`, for servers."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cannot(self, what: str) -> CannotDo:
        return CannotDo(f"a router of kind {self.kind or type(self).__name__} cannot {what}")


def load_router(
    name: str | Path,
    *,
    members: Sequence[str] | None = None,
    catalogue: str | Path | Mapping[str, Member] | None = None,
    **options: Any,
) -> Any:
    """The router that lies in a folder or Hub repository, full weights or LoRA adapter, on the GPU if there is one.

    Args:
        name: folder or Hub id.
        members: route among these only, in this order; None: all.
        catalogue: the pool as it is now, a file or its members: re-priced members, and new ones, which the prompt
            describes to the policy; those that are not in it are dropped. None: the pool of the training.
        options: of the kind's constructor.

    Raises:
        ValueError: `router.yaml` is missing or cannot be read, or a member is in no pool.
        OSError: no such folder or repository, or no policy in it.
    """
    file = read_router(name)
    return router_class(file.kind).load(str(name), file, members=members, catalogue=catalogue, **options)


def router_class(kind: str) -> Any:
    """The class of a kind."""
    module, _, attribute = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_queries(queries: Iterable[Any]) -> None:
    """ValueError for a query that is no text, or an empty one."""
    if not all(isinstance(query, str) and query.strip() for query in queries):
        raise ValueError("the query is empty")


@dataclass(frozen=True)
class RouterFile:
    """What `router.yaml` says."""

    kind: str
    settings: Mapping[str, Any]
    """Plain data; `settings_from` makes the kind's dataclass of it."""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    srpo: str | None = None
    path: Path = Path(ROUTER_FILE)

    def settings_of(self, cls: type[Settings], kind: str | None = None) -> Settings:
        """The settings as a dataclass, read strictly; `kind`: which one it must be.

        Raises:
            ValueError: names file, field and what is wrong.
        """
        if kind not in (None, self.kind):
            raise ValueError(f"{self.path}: is of kind {self.kind}, not {kind}; load_router gives the right class")
        try:
            return settings_from(cls, self.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: settings: {error}") from error


def write_router(
    folder: str | Path, kind: str, settings: Mapping[str, Any], made_from: Mapping[str, Any] | None = None
) -> Path:
    """Write `router.yaml` into a policy's folder; what looks like a secret is left out.

    Args:
        folder: exists.
        kind: a key of `KINDS`.
        settings: plain data, as `plain_settings` makes it of a dataclass.
        made_from: hashes of data and prices, by name.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of a router is unknown; use one of {', '.join(KINDS)}")
    document = {"kind": kind, "srpo": _own_version(), "made_from": dict(made_from or {}), "settings": dict(settings)}
    path = Path(folder, ROUTER_FILE)
    path.write_text(yaml.safe_dump(redacted(document), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def read_router(name: str | Path) -> RouterFile:
    """`router.yaml` of a folder or Hub repository.

    Raises:
        ValueError: there is none, or it cannot be read; names file and key.
        OSError: no such folder or repository.
    """
    if "/" not in str(name) and not Path(name).is_dir():
        raise ValueError(f"{name}: there is no such folder; give the folder of a router, or a Hub id (user/name)")
    if (path := _router_path(name)) is None:
        raise ValueError(
            f"{name} holds no {ROUTER_FILE}, so nothing says whom it routes to and how it was asked in training: give "
            "a folder or Hub id of a router that `srpo train` wrote"
        )
    return _read_router(path)


def find_router(policy: str) -> RouterFile | None:
    """`router.yaml` of a policy by its folder, Hub id or name; None: there is none, or no such policy, which whoever
    loads it says.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        path = _router_path(policy) if "/" in policy or Path(policy).is_dir() else None
    except OSError:
        return None
    return None if path is None else _read_router(path)


def _router_path(name: str | Path) -> Path | None:
    if Path(name).is_dir():
        path = Path(name, ROUTER_FILE)
        return path if path.is_file() else None
    from srpo.rollout.shared import find_file  # imports torch

    return find_file(str(name), ROUTER_FILE)


def _read_router(path: Path) -> RouterFile:
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must be a mapping with the keys kind, srpo, made_from and settings")
    for key in ("kind", "settings"):
        if key not in document:
            raise ValueError(f"{path}: the key {key!r} is missing")
    for key, value in document.items():
        wanted: Any = {"kind": str, "srpo": (str, type(None)), "made_from": dict, "settings": dict}.get(key)
        if wanted is None:
            raise ValueError(f"{path}: unknown key {key!r}; the keys are kind, srpo, made_from and settings")
        if not isinstance(value, wanted):
            raise ValueError(f"{path}: {key} is {value!r}; it must be a {'mapping' if wanted is dict else 'text'}")
    if document["kind"] not in KINDS:
        raise ValueError(f"{path}: kind {document['kind']!r} is unknown; use one of {', '.join(KINDS)}")
    return RouterFile(**document, path=path)


def plain_settings(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain data for YAML; of members only what may be shared. Inverse: `settings_from`."""
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings)}


def settings_from(cls: type[Settings], document: Mapping[str, Any]) -> Settings:
    """A dataclass from plain data: lists become tuples, mappings nested dataclasses, by the annotations.

    Raises:
        ValueError: a key that is no field, a field without default that is missing, or a value of another type.
    """
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, get_type_hints(cls)  # type: ignore[arg-type]
    if unknown := [str(name) for name in document if name not in fields]:
        raise ValueError(f"unknown key {unknown[0]!r}; the keys are {', '.join(fields)}")
    for name, one in fields.items():
        if one.default is one.default_factory is dataclasses.MISSING and name not in document:
            raise ValueError(f"the key {name!r} is missing")
    return cls(**{name: _typed(value, hints[name], name) for name, value in document.items()})


def members_now(
    trained: Iterable[Member],
    members: Sequence[str] | None = None,
    catalogue: str | Path | Mapping[str, Member] | None = None,
) -> tuple[Member, ...]:
    """The pool of a loaded router, as `load_router` describes it. Trained members come first, in their order.

    Raises:
        ValueError: a name that is in no pool, or a pool without members.
    """
    pool = {member.name: member for member in trained}
    if catalogue is not None:
        now = catalogue if isinstance(catalogue, Mapping) else load_catalogue(catalogue)
        kept = {name: _measured_before(now[name], old) for name, old in pool.items() if name in now}
        pool = {**kept, **{name: member for name, member in now.items() if name not in kept}}
    if members is not None:
        if unknown := [name for name in members if name not in pool]:
            raise ValueError(f"there is no member {unknown[0]!r} to route to; there are {', '.join(pool)}")
        pool = {name: pool[name] for name in members}
    if not pool:
        raise ValueError("a router needs at least one member to route to")
    return tuple(pool.values())


def _measured_before(now: Member, trained: Member) -> Member:
    """The member as it is now, with what was measured for the training's prompts."""
    latency = trained.latency if now.latency is None else now.latency
    return dataclasses.replace(now, latency=latency, examples=now.examples or trained.examples)


def _plain(value: Any) -> Any:
    if isinstance(value, Member):
        return shared_fields(value)
    if dataclasses.is_dataclass(value):
        return plain_settings(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _typed(value: Any, hint: Any, name: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        [hint] = [arg for arg in args if arg is not type(None)]
        return _typed(value, hint, name)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_typed(value[i], kind, f"{name}[{i}]") for i, kind in enumerate(kinds))
    if (origin or hint) in (dict, Mapping) and isinstance(value, Mapping):
        inner = args[1] if args else Any
        return {key: _typed(item, inner, f"{name}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        try:
            return shared_member(value) if hint is Member else settings_from(hint, value)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError(f"{name} is {value!r}; it must be {_described(hint)}")


def _described(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "a mapping")


def _own_version() -> str | None:
    try:
        return version("srpo")
    except PackageNotFoundError:  # on the path, not installed
        return None
