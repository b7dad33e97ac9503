"""Open-domain question sets, as Router-R1 trains and tests on them: question, accepted answers, nothing else.

`SETS` names the seven sets of the paper by their place on the Hub (`RUC-NLPIR/FlashRAG_datasets`, fields `question`
and `golden_answers`); a path ending in `.jsonl` is read from disk, one JSON object per line with a question
(`query` or `question`) and its answers (`gold` or `golden_answers`). Nothing is shipped: the sets have their own
licences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routers.table import normalise_query

HUB_ID = "RUC-NLPIR/FlashRAG_datasets"
SETS: dict[str, str] = {
    "nq": "nq",
    "triviaqa": "triviaqa",
    "popqa": "popqa",
    "hotpotqa": "hotpotqa",
    "2wiki": "2wikimultihopqa",
    "musique": "musique",
    "bamboogle": "bamboogle",
}
"""Our name -> configuration on the Hub."""
TEST_SPLITS = ("test", "dev", "train")
"""Router-R1 tests on the first of these that a set has (spec 1.7)."""
_QUESTION, _ANSWERS = ("query", "question"), ("gold", "golden_answers")


def load_qa(
    source: str | Path, split: str = "train", *, limit: int | None = None, seed: int = 42
) -> list[dict[str, Any]]:
    """Rows `{query_id, query, gold, family, split}` of one set, in the order of the source.

    Args:
        source: a name of `SETS` (read from the Hub), or a `.jsonl` file, which is its own split.
        split: "train", or "heldout": the first of `TEST_SPLITS` that the set has.
        limit: draw this many rows without replacement; a set with fewer gives all of them. None: all.
        seed: of the draw. Router-R1 draws 7,000 training rows of NQ and of HotpotQA, and up to 500 test rows, with 42.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, split or limit, no rows, or a bad row; names file or set, row and field.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'heldout'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    path = Path(source)
    if path.suffix == ".jsonl":
        family, raw = path.stem, _read_jsonl(path)
    elif str(source) in SETS:
        family, raw = str(source), _read_hub(str(source), split)
    else:
        raise ValueError(f"question set {str(source)!r} is neither a .jsonl file nor one of {', '.join(SETS)}")
    rows = [_row(entry, f"{source}: row {number}", family, number, split) for number, entry in enumerate(raw, start=1)]
    if not rows:
        raise ValueError(f"{source}: there are no rows")
    if limit is None or limit >= len(rows):
        return rows
    chosen = random.Random(f"{seed}:{family}:{split}").sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(chosen)]


def without_duplicates(
    rows: Iterable[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The rows whose question (as `normalise_query` writes it) stands neither earlier in `rows` nor in `others`.

    Give the test rows as `others`: no question may be trained on and tested on.
    """
    seen = {normalise_query(row["query"]) for row in others}
    kept = []
    for row in rows:
        key = normalise_query(row["query"])
        if key not in seen:
            seen.add(key)
            kept.append(dict(row))
    return kept


def _read_jsonl(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such question set")
    with path.open(encoding="utf-8") as file:  # not splitlines(), which also cuts at U+2028 inside a question
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: row {number} is not JSON: {error}") from error


def _read_hub(name: str, split: str) -> Iterable[Any]:
    from datasets import load_dataset

    parts = load_dataset(HUB_ID, SETS[name])
    wanted = ("train",) if split == "train" else TEST_SPLITS
    found = next((part for part in wanted if part in parts), None)
    if found is None:
        raise ValueError(f"{HUB_ID}, {SETS[name]}: has no split {' or '.join(wanted)}; it has {', '.join(parts)}")
    rows: Iterable[Any] = parts[found].select_columns(["question", "golden_answers"])
    return rows


def _row(raw: Any, label: str, family: str, number: int, split: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{label}: is {type(raw).__name__}, not an object with a question and its answers")
    question = _field(raw, _QUESTION, label)
    query = raw[question]
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{label}: field {question!r} is {query!r}; it must be a text that is not empty")
    answers = _field(raw, _ANSWERS, label)
    gold = raw[answers]
    if isinstance(gold, str) or not isinstance(gold, Sequence) or not all(isinstance(a, str) for a in gold):
        raise ValueError(f"{label}: field {answers!r} is {gold!r}; it must be a list of texts")
    accepted = [answer for answer in gold if answer.strip()]
    if not accepted:
        raise ValueError(f"{label}: field {answers!r} holds no answer; drop the row")
    return {"query_id": f"{family}-{number}", "query": query, "gold": accepted, "family": family, "split": split}


def _field(raw: Mapping[str, Any], names: tuple[str, ...], label: str) -> str:
    for name in names:
        if name in raw:
            return name
    raise ValueError(f"{label}: field {names[0]!r} (or {names[1]!r}) is missing; there are {sorted(map(str, raw))}")
