"""Routes to several members at once: a recorded table made anew, with a member `a+b` for every set of its members.

A set costs the sum of what its members cost and takes as long as the slowest. What it earns is the merger's:

    plurality   the score of the reply whose answer most members of the set gave; between equals, that of the member
                that is right most often on the training rows. A set of two earns what the better of them earns
                alone, and costs more: ask for `largest` 3
    f_beta      F = (1 + b^2) P R / (b^2 P + R), P = |set and right| / |set|, R = |set and right| / |right|, where
                `right` are the members that score 0.5 or more; 0 where none does. Inferred: the set-valued routers of
                GQR-Bench (arXiv 2505.14524) and TCAndon-Router (arXiv 2601.04544) state no formula of a reward. It is
                a quality of the choice of members, and no share of right answers

The answer of a reply is `routers.quickstart.grade.extract_answer`'s, or the whole reply where that finds none; whether
it is a number is seen from the accepted answers. An empty reply and one that says that its member failed agree with
none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from routers.data.catalogue import Member
from routers.data.converters import refuse_training
from routers.data.converters.build import Converted, TableBuilder
from routers.data.files import Row
from routers.data.table import ReplyTable, load_table, quickstart_table
from routers.quickstart.grade import FAILURE, are_numbers, extract_answer, normalise_answer
from srpo.quarantine import MAX_BAD_SHARE

Merger = Literal["plurality", "f_beta"]
MERGERS: tuple[Merger, ...] = get_args(Merger)
MOST_SETS = 200
RIGHT = 0.5


def convert_sets(
    source: str,
    catalogue: str | None = None,
    *,
    largest: int = 2,
    merger: Merger = "f_beta",
    beta: float = 1.0,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Converted:
    """The table of all sets of 1 to ``largest`` members, with the ids, splits and accepted answers of its source.

    Args:
        source: a table of recorded replies, or `quickstart`.
        catalogue: its prices; None: those beside it.
        beta: of `f_beta`: above 1, a right member that is left out weighs more than a wrong one that is asked.
        max_bad_share: of the source's rows. Queries without an outcome of every member are left out, and counted.

    Raises:
        ValueError: sets that cannot be made of this table, or a number out of range; a log, or a table that must not
            be trained on.
    """
    refuse_training(source)
    if source == "quickstart":
        table = quickstart_table(catalogue)
    else:
        table = load_table(source, catalogue, max_bad_share=max_bad_share, drop_incomplete=True)
    correct, cost, seconds = (table.matrix(field) for field in ("correct", "cost", "seconds"))
    sets = _sets(table, largest)
    if merger not in MERGERS:
        raise ValueError(f"there is no merger {merger!r}; there are {', '.join(MERGERS)}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; it must be a finite number above 0")
    if merger == "plurality" and not table.has_replies:
        raise ValueError(f"{source}: has no replies, which plurality compares; use --merger f_beta")
    asks, writes = table.matrix("prompt_tokens"), table.matrix("completion_tokens")
    answers = _answers(table) if merger == "plurality" else None
    trusted = table.means("correct", "train" if table.queries("train") else None)
    built = TableBuilder("sets", max_bad_share)
    built.dropped += [{"file": source, **entry} for entry in table.bad_rows]
    for reason, left_out in (("incomplete query", table.incomplete), ("repeated query", table.repeated)):
        for query_id in left_out:
            built.drop(reason, query_id)
    names = {one: "+".join(table.members[j] for j in one) for one in sets}
    built.prices = {  # none, for every row says what it cost
        name: Member(name, " + ".join(table.catalogue[table.members[j]].descriptor for j in one))
        for one, name in names.items()
    }
    speaker = {} if answers is None else {one: plurality(answers, one, trusted) for one in sets}
    earned = {} if speaker else {one: f_beta(correct, one, beta) for one in sets}
    queries = table.queries()

    def add(item: dict[str, int]) -> None:
        i = item["query"]
        query = queries[i]
        number = built.query(query["query"], query["family"], table.gold(query["query_id"]), query["split"])
        for one, name in names.items():
            j = list(one)
            told = {"cost": cost[i, j].sum(), "seconds": seconds[i, j].max()}
            told |= {"prompt_tokens": int(asks[i, j].sum()), "completion_tokens": int(writes[i, j].sum())}
            if speaker:
                chosen = table.lookup(query["query_id"], table.members[speaker[one][i]])
                score, told["reply"] = chosen.correct, chosen.reply
            else:
                score = earned[one][i]
            built.reply(number, name, score, **told)
        built.ids.append(query["query_id"])  # last: what fails above leaves nothing behind

    rows = (Row(i + 1, {"query": i}) for i in range(len(queries)))
    built.add_all(source, rows, add, f"queries of {source}")
    return built.finish()


def f_beta(correct: np.ndarray, one: Sequence[int], beta: float) -> np.ndarray:
    """F of a set of columns on every query, ``[queries]``, of scores ``[queries, members]``."""
    right = correct >= RIGHT
    hits, all_right = right[:, list(one)].sum(axis=1), right.sum(axis=1)
    # (1 + b^2) P R / (b^2 P + R), with P = hits / |set| and R = hits / all_right, without their division by 0
    return np.asarray((1 + beta**2) * hits / (beta**2 * all_right + len(one)))


def plurality(answers: np.ndarray, one: Sequence[int], trusted: np.ndarray) -> np.ndarray:
    """The column of the member whose reply a set gives, ``[queries]``; of equals the most trusted, then the first.

    Args:
        answers: equal numbers are equal answers, ``[queries, members]``.
        trusted: ``[members]``.
    """
    order = np.array(sorted(one, key=lambda j: -trusted[j]))
    votes = (answers[:, order, None] == answers[:, None, order]).sum(axis=2)
    return np.asarray(order[votes.argmax(axis=1)])


def _sets(table: ReplyTable, largest: int) -> list[tuple[int, ...]]:
    count = len(table.members)
    if not 1 <= largest <= count:
        raise ValueError(f"largest is {largest}; a set has from 1 to {count} of the table's {count} members")
    if joined := [name for name in table.members if "+" in name]:
        raise ValueError(f"member {joined[0]!r} has a + in its name, as sets have; rename it")
    if (found := sum(math.comb(count, size) for size in range(1, largest + 1))) > MOST_SETS:
        raise ValueError(f"{found:,} sets of {count} members are more than {MOST_SETS}; give a smaller --largest")
    return [one for size in range(1, largest + 1) for one in itertools.combinations(range(count), size)]


def _answers(table: ReplyTable) -> np.ndarray:
    """A number for each reply, ``[queries, members]``: within a query, the same for the same answer."""
    found = np.empty((len(table), len(table.members)), dtype=np.int64)
    for i, query in enumerate(table.queries()):
        gold = table.gold(query["query_id"])
        seen: dict[str, int] = {}
        numeric = bool(gold) and are_numbers(gold)
        for j, member in enumerate(table.members):
            reply = table.lookup(query["query_id"], member).reply
            silent = not reply.strip() or reply.startswith(FAILURE)
            answer = normalise_answer(extract_answer(query["query"], reply, numeric) or reply)
            found[i, j] = seen.setdefault(f"{answer}\0{member}" if silent else answer, len(seen))
    return found
