"""Checks that run before step 1 (dataset rows) and on every batch (what reward functions return).

A bad row is named, written to a quarantine file and left out; a bad reward stops the run and names its function and
row. Neither may turn into a training signal.
"""

import functools
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.columns import LOST_ROW, as_list, broken_text
from srpo.quarantine import BadRows as BadRows  # the public name
from srpo.quarantine import Quarantine
from srpo.row_types import odd_types, shown

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool", "developer")


def check_rows(
    dataset: "Dataset | Sequence[Mapping[str, Any]]",
    *,
    tokenizer: Any = None,
    max_prompt_length: int | None = None,
    id_column: str = "query_id",
    quarantine_path: str | Path,
    strict: bool = False,
    max_bad_share: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> "Dataset":
    """The rows that can be trained on.

    Args:
        dataset: rows with a `prompt`: a text, or chat messages `[{"role": ..., "content": ...}, ...]`. A list of
            mappings is taken too: rows read from a file, of which one has the wrong type, cannot become a Dataset.
        tokenizer: counts prompt tokens, after its chat template for messages; None: lengths are not checked.
        max_prompt_length: tokens; None: any length.
        id_column: must be unique and not null, where the dataset has it. The first row of an id is kept.
        quarantine_path: JSON lines with `row`, `reason`, `detail`, `content`; removed if there is no bad row.
        strict: raise instead of leaving rows out, whatever their share.
        max_bad_share: raise above this share of bad rows; up to it they are left out.
        chat_template_kwargs: as training passes them to the chat template.

    Raises:
        BadRows: more bad rows than that (strict: any), or no good row at all.
    """
    ids: dict[Any, int] = {}
    bad = Quarantine("dataset rows", quarantine_path, 0.0 if strict else max_bad_share)
    good: list[int] = []
    for index, row in enumerate(dataset):
        problem = _prompt_problem(row) or _id_problem(row, id_column, ids) or _column_problem(row)
        if problem is None and tokenizer is not None and max_prompt_length is not None:
            length = _prompt_length(row["prompt"], tokenizer, chat_template_kwargs or {})
            if length > max_prompt_length:
                problem = ("over-long prompt", f"{length} tokens, at most {max_prompt_length}")
        if problem is None:
            good.append(index)
            if id_column in row:
                ids[row[id_column]] = index
        else:
            bad.add(index, *problem, shown(row.get("prompt") if isinstance(row, Mapping) else row))
    total = len(good) + len(bad)
    if not hasattr(dataset, "features"):  # a Dataset's columns have one type each already
        odd = odd_types([dataset[index] for index in good])
        for i, (name, detail) in odd.items():
            bad.add(good[i], "mixed types", detail, shown(dataset[good[i]][name]))
        good = [index for i, index in enumerate(good) if i not in odd]
    bad.settle(total)
    return _selected(dataset, good)


def checked_reward(func: Callable[..., Any]) -> Callable[..., Any]:
    """A TRL reward function whose values are checked: a list with one finite number, or None, per completion.

    None means that the reward does not apply to that row, as in TRL. The function never sees lost rows (whose
    `srpo.columns.LOST_ROW` says why): their reward is None. Synchronous and asynchronous functions are both wrapped,
    and keep their name (TRL logs rewards under it).

    Raises:
        ValueError: when called; names function, row, `query_id` where there is one, and the value.
    """
    inner = func.func if isinstance(func, functools.partial) else func
    name = getattr(inner, "__name__", type(inner).__name__)
    if _is_async(func):

        async def checked_async(*args: Any, **kwargs: Any) -> list[float | None]:
            rows = _Survivors(args, kwargs)
            values = await func(*rows.args, **rows.kwargs) if rows.any else []
            return rows.spread(_checked_values(name, values, rows.args, rows.kwargs))

        return _named_like(checked_async, func, name)

    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        rows = _Survivors(args, kwargs)
        values = func(*rows.args, **rows.kwargs) if rows.any else []
        return rows.spread(_checked_values(name, values, rows.args, rows.kwargs))

    return _named_like(checked, func, name)


def distinct(funcs: list[Any]) -> list[Any]:
    """Reward functions of which no two log under one name: the second `<lambda>` becomes `<lambda>_2`.

    Those made by `checked_reward` are renamed; reward models and paths stay as they are.
    """
    seen: Counter[str] = Counter()
    for func in funcs:
        if name := getattr(func, "__name__", None):
            seen[name] += 1
            if seen[name] > 1:
                func.__name__ = f"{name}_{seen[name]}"
                logger.warning("Two reward functions are named %r; one of them is logged as %r", name, func.__name__)
    return funcs


class _Survivors:
    """The arguments of a reward function without the lost rows, and its values with them."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]):
        kwargs = dict(kwargs)
        lost = kwargs.pop(LOST_ROW, None)
        self._all = len(lost) if isinstance(lost, list) else None
        self._kept = [i for i, cause in enumerate(lost or ()) if cause is None]
        if self._all is None or len(self._kept) == self._all:
            self._all, self.args, self.kwargs, self.any = None, tuple(args), kwargs, True
            return
        self.any = bool(self._kept)
        self.args = tuple(self._part(value) for value in args)
        self.kwargs = {name: self._part(value) for name, value in kwargs.items()}
        if (log := kwargs.get("log_extra")) is not None:
            self.kwargs["log_extra"] = lambda column, values: log(column, self.spread(as_list(values)))

    def _part(self, value: Any) -> Any:
        return [value[i] for i in self._kept] if isinstance(value, list) and len(value) == self._all else value

    def spread(self, values: Sequence[Any]) -> list[Any]:
        if self._all is None or len(values) != len(self._kept):
            return list(values)
        rows: list[Any] = [None] * self._all
        for i, value in zip(self._kept, values, strict=True):
            rows[i] = value
        return rows


def _named_like(wrapper: Callable[..., Any], func: Callable[..., Any], name: str) -> Callable[..., Any]:
    functools.update_wrapper(wrapper, func)
    wrapper.__name__ = name  # callable objects and partials have none of their own
    return wrapper


def _is_async(func: Any) -> bool:
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(func.__call__)  # an object's own method


def _selected(dataset: Any, rows: list[int]) -> "Dataset":
    from datasets import Dataset  # here, because importing it takes a second

    if not isinstance(dataset, Dataset):
        return Dataset.from_list([dict(dataset[row]) for row in rows])
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def _prompt_problem(row: Any) -> tuple[str, str] | None:
    if not isinstance(row, Mapping):
        return "wrong type", f"the row is a {type(row).__name__}, not a mapping"
    if "prompt" not in row:
        return "missing prompt", f"the row has only {', '.join(sorted(map(str, row)))}"
    prompt = row["prompt"]
    if prompt is None:
        return "null prompt", "prompt is null"
    if isinstance(prompt, str):
        return _text_problem("prompt", prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        return "wrong type", f"prompt is a {type(prompt).__name__}, not a text or a list of messages"
    if not prompt:
        return "empty prompt", "prompt has no messages"
    for position, message in enumerate(prompt):
        where = f"message {position}"
        if not isinstance(message, Mapping):
            return "malformed messages", f"{where} is a {type(message).__name__}, not a mapping with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return "malformed messages", f"{where} has the role {role!r}, not one of {', '.join(_ROLES)}"
        if (isinstance(content, list) and content) or message.get("tool_calls"):
            continue  # parts of a multimodal message, or a call: the chat template checks them
        if not isinstance(content, str):
            return "malformed messages", f"{where} has content of type {type(content).__name__}, not a text"
        problem = _text_problem(where, content)
        if problem is not None:
            return problem
    if prompt[-1]["role"] == "assistant":
        return "malformed messages", "the last message is the assistant's: nothing is left to answer"
    return None


def _text_problem(where: str, text: str) -> tuple[str, str] | None:
    if not text.strip():
        return "empty prompt", f"{where} holds no text"
    problem = broken_text(text)
    return None if problem is None else ("invalid text", f"{where} {problem}")


def _column_problem(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """A text, in whatever column and however deep, that no file, tokenizer or table takes."""
    for name, value in row.items():
        if (problem := broken_text(value)) is not None:
            return "invalid text", f"column {name!r} {problem}"
    return None


def _id_problem(row: Mapping[str, Any], id_column: str, seen: Mapping[Any, int]) -> tuple[str, str] | None:
    if id_column not in row:
        return None
    value = row[id_column]
    if value is None:
        return "null id", f"{id_column} is null"
    if not isinstance(value, (str, int)):
        return "wrong type", f"{id_column} is a {type(value).__name__}, not a text or an integer"
    if value in seen:
        return "duplicate id", f"{id_column} {value!r} is already in row {seen[value]}"
    return None


def _prompt_length(prompt: Any, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
    )["input_ids"]
    return len(ids)


def _checked_values(name: str, values: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float | None]:
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"reward function {name!r} returned a {type(values).__name__}, not a list of values")
    completions = kwargs.get("completions", args[1] if len(args) > 1 else args[0] if args else None)
    if completions is not None and len(values) != len(completions):
        raise ValueError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions")
    return [_checked_value(name, row, value, kwargs.get("query_id")) for row, value in enumerate(values)]


def _checked_value(name: str, row: int, value: Any, query_ids: Sequence[Any] | None) -> float | None:
    if value is None:
        return None
    problem = None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        problem = f"{value!r} of type {type(value).__name__}, not a number"
    elif not math.isfinite(value):
        problem = f"{float(value)}; return None where the reward does not apply"
    if problem is not None:
        where = f"row {row}" if query_ids is None else f"row {row} (query_id {query_ids[row]!r})"
        raise ValueError(f"reward function {name!r} returned for {where} {problem}")
    return float(value)
