"""Grades a final answer: exact match, token F1, numbers and letters. The one owner of answer normalisation.

`normalise`, `exact_match` and `f1` are SQuAD's (Rajpurkar et al. 2016, evaluate-v1.1.py), as in Router-R1
(verl/utils/reward_score/qa_em.py), so that numbers compare. Two things are ours: text is composed first (NFC), and an
answer of which normalisation leaves nothing ("The") equals only its own spelling.
The grader of the recorded quickstart pool (`routers.queries.grade`) extracts an answer from free text; here the policy
has marked its answer.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Metric = Literal["em", "f1", "numeric", "choice"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?:\s|$)|$)")
RELATIVE_TOLERANCE = 1e-6


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an, the, with single spaces."""
    text = unicodedata.normalize("NFC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer equals one of the accepted answers after normalisation, else 0.0."""
    return float(any(_comparable(answer) == _comparable(gold) for gold in golds))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, the best over the accepted answers, 0 to 1."""
    return max((_f1(_comparable(answer).split(), _comparable(gold).split()) for gold in golds), default=0.0)


def numeric(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer holds exactly one number and that equals an accepted one (relative tolerance 1e-6).

    Thousands separators, a leading currency sign and words around the number do not matter.
    """
    value = _one_number(answer)
    if value is None:
        return 0.0
    accepted = (_one_number(gold) for gold in golds)
    return float(any(gold is not None and math.isclose(value, gold, rel_tol=RELATIVE_TOLERANCE) for gold in accepted))


def choice(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer begins with the right letter ("B", "(b)", "B. Paris", "B: ..."), or is an accepted text."""
    letters = {gold.strip().upper() for gold in golds if _letter(gold) == gold.strip().upper()}
    # Letters are not compared as texts: normalisation takes "A" for an article, so that "A, B" would equal "B".
    texts = [gold for gold in golds if gold.strip().upper() not in letters]
    return float(_letter(answer) in letters or exact_match(answer, texts))


def f1_of_one_answer(answer: str, golds: Sequence[str]) -> float:
    """`f1`, but 0 unless more than half of the answer's words are the accepted answer's.

    A list of candidates would otherwise earn more than one honest guess that is wrong.
    """

    def one(gold: str) -> float:
        words, accepted = _comparable(answer).split(), _comparable(gold).split()
        return _f1(words, accepted) if 2 * _overlap(words, accepted) > len(words) else 0.0

    return max((one(gold) for gold in golds), default=0.0)


_SCORERS: dict[Metric, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1_of_one_answer,
    "numeric": numeric,
    "choice": choice,
}


def score(answer: str | None, golds: Sequence[str], metric: Metric) -> float:
    """What the answer earns, 0 to 1; no answer earns nothing.

    Raises:
        ValueError: unknown metric, or no accepted answer to compare with.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")
    if isinstance(golds, str) or not golds:
        raise ValueError(f"gold is {golds!r}; it must be a list of at least one accepted answer")
    return 0.0 if answer is None else _SCORERS[metric](answer, golds)


def _comparable(text: str) -> str:
    return normalise(text) or text.strip().casefold()


def _overlap(words: Sequence[str], accepted: Sequence[str]) -> int:
    return sum((Counter(words) & Counter(accepted)).values())


def _f1(words: Sequence[str], accepted: Sequence[str]) -> float:
    common = _overlap(words, accepted)
    return 2 * common / (len(words) + len(accepted)) if common else 0.0


def _one_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if len(found) != 1:
        return None
    value = float(found[0].replace(",", ""))
    return value if math.isfinite(value) else None


def _letter(text: str) -> str:
    match = _LETTER.match(text.strip())
    return match.group(1).upper() if match else ""
