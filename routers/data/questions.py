"""Open-domain question sets, as Router-R1 trains and tests on them: question, accepted answers, nothing else.

`SETS` names the seven sets of the paper by their place on the Hub (`RUC-NLPIR/FlashRAG_datasets`, fields `question`
and `golden_answers`); a file of any format of `routers.data.files` is read from disk, one row with a question (`query`
or `question`) and its answers (`gold` or `golden_answers`: a list, or one) each. Nothing is shipped: the sets have
their own licences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routers.data import cells
from routers.data.files import BadRow, Row, format_of, names_a_file, read_rows
from routers.data.table import normalise_query
from srpo.quarantine import MAX_BAD_SHARE, Quarantine

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
    source: str | Path,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 42,
    max_bad_share: float = MAX_BAD_SHARE,
    quarantine_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Rows `{query_id, query, gold, family, split}` of one set, in the order of the source.

    Args:
        source: a name of `SETS` (read from the Hub), or a file (`routers.data.files`), which is its own split.
        split: "train", or "heldout": the first of `TEST_SPLITS` that the set has.
        limit: draw this many rows without replacement; a set with fewer gives all of them. None: all.
        max_bad_share: of bad rows, which are left out; above it there is an error.
        quarantine_path: where they are written; None: warnings only.
        seed: of the draw. Router-R1 draws 7,000 training rows of NQ and of HotpotQA, and up to 500 test rows, with 42.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, split or limit, no rows, or a bad row; names file or set, row and field.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'heldout'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if str(source) in SETS and not Path(source).exists():
        family, raw = str(source), _read_hub(str(source), split)
    elif names_a_file(source):
        family, raw = _stem(Path(source)), _read_file(Path(source))
    else:
        raise ValueError(f"question set {str(source)!r} is neither a file nor one of {', '.join(SETS)}")
    bad = Quarantine(f"rows of {source}", quarantine_path, max_bad_share, label=f"{Path(source).name}: ")
    rows = []
    for number, entry in raw:
        try:
            asked = question_of(entry)
            row = {"query_id": f"{family}-{number}", "query": asked["query"], "gold": asked["gold"]}
            rows.append({**row, "family": family, "split": split})
        except ValueError as error:
            reason = entry.reason if isinstance(entry, BadRow) else "not a question with answers"
            bad.add(number, reason, str(error), entry)
    if not rows and not bad:
        raise ValueError(f"{source}: there are no rows")
    bad.settle(len(rows) + len(bad))
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


def _stem(path: Path) -> str:
    """The file's name without its format: "nq.jsonl.gz" is nq."""
    while path.suffix and format_of(path) is not None:
        path = path.with_suffix("")
    return path.name


def _read_file(path: Path) -> list[Row]:
    if not path.expanduser().exists():
        raise FileNotFoundError(f"{path}: no such question set")
    return read_rows(path)


def _read_hub(name: str, split: str) -> Iterable[Row]:
    from datasets import load_dataset

    parts = load_dataset(HUB_ID, SETS[name])
    wanted = ("train",) if split == "train" else TEST_SPLITS
    found = next((part for part in wanted if part in parts), None)
    if found is None:
        raise ValueError(f"{HUB_ID}, {SETS[name]}: has no split {' or '.join(wanted)}; it has {', '.join(parts)}")
    rows = parts[found].select_columns(["question", "golden_answers"])
    return (Row(number, row) for number, row in enumerate(rows, start=1))


def question_of(raw: Any, needs_answers: bool = True) -> dict[str, Any]:
    """`{query, gold}` of a row; `gold` may be empty where no answers are needed.

    Raises:
        ValueError: names the field that is missing or wrong.
    """
    if isinstance(raw, BadRow):
        raise ValueError(raw.detail)
    if not isinstance(raw, Mapping):
        raise ValueError(f"is {type(raw).__name__}, not an object with a question and its answers")
    question = _field(raw, _QUESTION)
    row: dict[str, Any] = {"query": read_cell(raw, question, lambda value: cells.name(value, strip=False)), "gold": []}
    if needs_answers or any(name in raw for name in _ANSWERS):
        answers = _field(raw, _ANSWERS)
        row["gold"] = [answer for answer in read_cell(raw, answers, cells.answers) if answer.strip()]
        if needs_answers and not row["gold"]:
            raise ValueError(f"field {answers!r} holds no answer; drop the row")
    return row


def read_cell(raw: Mapping[str, Any], field: str, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of a field; its ValueError then names the field and what it holds."""
    try:
        return read(raw[field])
    except ValueError as error:
        raise ValueError(f"field {field!r} is {raw[field]!r}; {error}") from None


def _field(raw: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in raw:
            return name
    raise ValueError(f"field {names[0]!r} (or {names[1]!r}) is missing; there are {sorted(map(str, raw))}")
