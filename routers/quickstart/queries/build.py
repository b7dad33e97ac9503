"""Draws the queries of every family, without duplicates, from one seed.

A generator is ``draw(rng) -> (text, accepted answers, key)``. The key names the question behind the wording
("capital", "France"), so that one question is never asked twice in two phrasings, in one split or across them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from routers.data.table import normalise_query
from routers.quickstart.queries import arithmetic, common, dates, facts, numbers, words

Draw = Callable[[random.Random], tuple[str, list[str], tuple[object, ...]]]

# family -> (generator, how many queries are asked for)
FAMILIES: dict[str, tuple[Draw, int]] = {
    "sums": (arithmetic.draw_sum, 190),
    "word_problems": (arithmetic.draw_word_problem, 180),
    "units": (arithmetic.draw_unit, 160),
    "dates": (dates.draw, 190),
    "words": (words.draw, 200),
    "numbers": (numbers.draw, 190),
    "countries": (facts.draw_country, 230),
    "elements": (facts.draw_element, 150),
    "states": (facts.draw_state, 120),
    "common": (common.draw, 190),
}
SEED = 20260
MAX_REPEATS = 3000


@dataclass(frozen=True)
class Query:
    """One question. ``gold`` are the accepted answers; the first is the canonical one."""

    query_id: str
    text: str
    family: str
    gold: tuple[str, ...]


def build_queries(seed: int = SEED, per_family: int | None = None) -> list[Query]:
    """All queries, families in order, the same for the same seed and package versions.

    Args:
        seed: of the generators.
        per_family: at most so many per family (a pilot); ``None`` for the counts of ``FAMILIES``.

    A family that repeats itself ``MAX_REPEATS`` times in a row is exhausted and stays smaller than asked for.
    """
    queries: list[Query] = []
    seen_texts: set[str] = set()
    for family, (draw, count) in FAMILIES.items():
        rng = random.Random(f"{seed}/{family}")
        seen_keys: set[tuple[object, ...]] = set()
        repeats = 0
        wanted = count if per_family is None else min(count, per_family)
        while len(seen_keys) < wanted and repeats < MAX_REPEATS:
            text, gold, key = draw(rng)
            normalised = normalise_query(text)
            if key in seen_keys or normalised in seen_texts:
                repeats += 1
                continue
            repeats = 0
            seen_keys.add(key)
            seen_texts.add(normalised)
            queries.append(Query(f"{family}-{len(seen_keys):04d}", text, family, tuple(gold)))
    return queries
