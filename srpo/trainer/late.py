"""`reward_deadline`, `world_deadline`: a function of the user's is asked for one completion at a time, for so long.

A plain function runs in a process of its own, which is killed when it is late (`srpo.run.apart`). The `await` of an
async one is cancelled: completions are still asked for at the same time. What gave no answer is lost: it has no reward
in any function and leaves its group, as a rollout does that is lost to its world.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from srpo.columns import as_list
from srpo.run.apart import LOGS, Apart, Logged, Lost
from srpo.types import LOST, Columns, World

_SHARED = "trainer_state"


def one_by_one(func: Callable[..., Any], name: str, seconds: float) -> Callable[..., list[Any]]:
    """A reward function that gives its values, or `Lost`, one after the other.

    Raises:
        ValueError: it cannot run in another process.
    """
    apart = Apart(func, f"reward function {name!r}", "reward_deadline", seconds)

    def ask(*args: Any, **kwargs: Any) -> list[Any]:
        count, values, logs = _count(args, kwargs), [], []
        sinks = {log: kwargs.pop(log) for log in LOGS if log in kwargs}
        apart.share({_SHARED: kwargs.pop(_SHARED)} if _SHARED in kwargs else {})
        for i in range(count):
            given, named = _one(i, count, args, kwargs)
            try:
                value, logged = apart(*given, **named, **dict.fromkeys(sinks))
            except RuntimeError as error:
                error.add_note(_row(i, kwargs))
                raise
            values.append(_only(name, value))
            logs.append(logged)
        _log(logs, sinks)
        return values

    return ask


def one_by_one_async(func: Callable[..., Awaitable[Any]], name: str, seconds: float) -> Callable[..., Awaitable[Any]]:
    """The same of an async reward function, all completions at once."""

    async def ask(*args: Any, **kwargs: Any) -> list[Any]:
        count = _count(args, kwargs)
        sinks = {log: kwargs.pop(log) for log in LOGS if log in kwargs}
        logs: list[Logged] = [[] for _ in range(count)]

        async def one(i: int) -> Any:
            given, named = _one(i, count, args, kwargs)
            for log in sinks:
                named[log] = lambda column, value, log=log: logs[i].append((log, column, value))
            try:
                async with asyncio.timeout(seconds) as clock:
                    return _only(name, await func(*given, **named))
            except TimeoutError:
                if not clock.expired():
                    raise
                return Lost(f"reward function {name!r} gave no answer within {seconds:g} s (reward_deadline)")

        values = await asyncio.gather(*(one(i) for i in range(count)))
        _log(logs, sinks)
        return values

    return ask


def world_one_by_one(world: World | None, seconds: float | None) -> World | None:
    """A world that says of late completions that they are lost; arguments and errors as of `one_by_one`. Without
    `seconds` it is the same world."""
    if world is None or seconds is None:
        return world
    apart = Apart(world, "the world", "world_deadline", seconds)

    def ask(rows: Sequence[Any], texts: Sequence[str]) -> Columns:
        found: list[dict[str, Any]] = []
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            try:
                columns, _ = apart([row], [text])
            except RuntimeError as error:
                error.add_note(f"row {i} of the batch")
                raise
            if isinstance(columns, Lost):
                columns = {LOST: [columns.cause]}
            found.append({column: _only("the world", values) for column, values in columns.items()})
        names = {LOST: None, **dict.fromkeys(column for columns in found for column in columns)}
        return {column: [columns.get(column) for columns in found] for column in names}

    return ask


def _count(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    return len(kwargs.get("completions", args[1] if len(args) > 1 else args[0] if args else ()))


def _one(i: int, count: int, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of one completion; what is no column is everyone's."""

    def part(value: Any) -> Any:
        return [value[i]] if isinstance(value, list) and len(value) == count else value

    return [part(value) for value in args], {name: part(value) for name, value in kwargs.items()}


def _only(name: str, values: Any) -> Any:
    if isinstance(values, Lost):
        return values
    values = as_list(values)
    if len(values) != 1:
        raise ValueError(f"{name} returned {len(values)} values for 1 completion")
    return values[0]


def _row(i: int, kwargs: dict[str, Any]) -> str:
    ids = kwargs.get("query_id")
    return f"row {i} of the batch" + ("" if ids is None else f", query_id {ids[i]!r}")


def _log(logs: Sequence[Logged], sinks: dict[str, Callable[..., Any]]) -> None:
    """What was logged for single completions: metrics as they come, columns with a value per completion."""
    columns: dict[str, list[Any]] = {}
    for i, logged in enumerate(logs):
        for log, name, value in logged:
            if log == "log_metric":
                sinks[log](name, value)
            else:
                columns.setdefault(name, [None] * len(logs))[i] = _only(f"log_extra of {name!r}", value)
    for name, values in columns.items():
        sinks["log_extra"](name, values)
