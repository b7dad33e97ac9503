"""What a run has lost and why, by what it noted itself (`srpo.losses`), its quarantine files and its books."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from routers.evaluation.episodes import LOST, Episodes
from routers.evaluation.tables import Section
from srpo.losses import noted

TITLE = "What was lost"
NOTHING = "Nothing: no row, rollout, step, push, call or item."
BUDGET = (
    "How much may be lost before a run stops is in the recipe: max_bad_share of rows, max_lost_share of rollouts in "
    "max_lost_batches batches, max_bad_steps, max_cost_usd; a push may take hub_deadline. What was lost again after a "
    "resume counts again. The last push comes after this page: the exit code tells of it (75)."
)
_NAMES = {"rollouts": "rollouts of the training", "steps": "steps that were not made", "pushes": "pushes to the Hub"}
_CAUSES = 3
_LONGEST = 160
"""Characters of a cause."""


def losses(folder: Path, episodes: Episodes) -> Section:
    """A table of what, how many, of how many and why.

    Args:
        folder: OUTPUT of a run; anything else has lost nothing but what `episodes` say.
        episodes: that were played for the report.
    """
    rows = [*_rows(folder), *_noted(noted(folder)), *_calls(folder), *_items(episodes)]
    if not rows:
        return Section(TITLE, (), [NOTHING])
    return Section(TITLE, [("", "lost", "of", "why"), *rows], [BUDGET])


def _rows(folder: Path) -> Iterable[tuple[str, ...]]:
    for path in sorted(folder.glob("quarantine*.jsonl")):
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        causes = Counter(str(entry["reason"]) for entry in entries if entry["row"] is not None)
        if causes:
            yield f"rows of data ({path.name})", f"{causes.total():,}", "", _why(causes)


def _noted(lines: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    found: dict[str, Counter[str]] = {}
    amounts: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for line in lines:
        found.setdefault(line["what"], Counter()).update(line["why"])
        of[line["what"]] += line["of"] or 0
        amounts.update({name: line.get(name, 0) for name in ("dropped", "tokens", "usd")})
    for what, name in _NAMES.items():
        if what in found:
            among = f"{of[what]:,} of those batches" if of[what] else ""
            yield name, f"{found[what].total():,}", among, _why(found[what])
        if what == "rollouts" and what in found:
            yield "rollouts left out with their groups", f"{amounts['dropped']:,}", "", "of a group too many were lost"
            yield "tokens that the policy wrote in lost rollouts", f"{amounts['tokens']:,}", "", ""
            yield "USD of lost rollouts", f"{amounts['usd']:.6f}", "", "members had been paid"


def _calls(folder: Path) -> Iterable[tuple[str, ...]]:
    members: dict[str, Counter[str]] = {}
    overrun = 0.0
    for path in sorted(folder.glob("spending_*.json")):
        books = json.loads(path.read_text(encoding="utf-8"))
        overrun += books["overrun"]
        for name, spending in books["members"].items():
            members.setdefault(name, Counter()).update(spending)
    for name, sums in members.items():
        if sums["failed"]:
            told = "without an answer in the end, retries included"
            yield f"calls of {name}", f"{sums['failed']:,}", f"{sums['calls']:,}", told
        if sums["unmetered"]:
            told = "failed without reported usage: counted as nothing, the provider may have billed them"
            yield f"attempts at {name}, perhaps paid", f"{sums['unmetered']:,}", "", told
    if overrun:
        yield "USD above what was reserved", f"{overrun:.6f}", "", "members cost more than could be known before"


def _items(episodes: Episodes) -> Iterable[tuple[str, ...]]:
    frame = episodes.frame
    for router, played in frame.groupby("router", sort=False):
        if count := int((played["stop"] == LOST).sum()):
            yield f"items of {router}", f"{count:,}", f"{len(played):,}", "the pool failed on them; left out for all"


def _why(causes: Counter[str]) -> str:
    most = [f"{n:,} x {' '.join(cause.split())[:_LONGEST]}" for cause, n in causes.most_common(_CAUSES)]
    return "; ".join([*most, *(["..."] if len(causes) > _CAUSES else [])])
