"""Checks of dataset rows, before step 1: a bad row is named, written to a quarantine file and left out.

What reward functions return is checked on every batch (`srpo.trainer.rewards`).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo.columns import broken_text
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
