"""Grades a final answer: exact match, token F1, numbers and letters. The one owner of answer normalisation.

For words, `normalise`, `exact_match` and `f1` are SQuAD's (Rajpurkar et al. 2016, evaluate-v1.1.py), as in Router-R1
(verl/utils/reward_score/qa_em.py), so that results compare. Three things are ours: text is composed first (NFC), an
answer of which normalisation leaves nothing ("The") equals only its own spelling, and numbers are numbers. SQuAD takes
their signs, points and slashes for punctuation, so that "-5" equals "5" and "1.5" equals "15"; here a number keeps
them and is compared by its value (`routers.data.written_numbers`). A currency sign that one side lacks is ignored.
The grader of the recorded quickstart pool (`routers.quickstart.grade`) extracts an answer from free text; here
the policy has marked its answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from routers.data.written_numbers import CURRENCIES, readable, rewritten, same, stated

Metric = Literal["em", "f1", "numeric", "choice"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Grade = Literal[Metric, "contains"]
"""How replies are graded that nobody trains on: a policy would learn to write every candidate for `contains`."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?:\s|$)|$)")
_CURRENCY = re.compile(f"[{CURRENCIES}]")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the articles a, an, the, with single spaces. Numbers stay."""
    text = rewritten(readable(unicodedata.normalize("NFC", text).lower()), lambda words: words.translate(_PUNCTUATION))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer equals one of the accepted answers after normalisation, else 0.0."""
    return float(any(words == accepted for words, accepted in _sides(answer, golds)))


def f1(answer: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, the best over the accepted answers, 0 to 1."""
    return max((_f1(words, accepted) for words, accepted in _sides(answer, golds)), default=0.0)


def numeric(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the answer states one number and that equals an accepted one (relative tolerance 1e-6).

    What a text states is `routers.data.written_numbers.stated`: "18 apples" states 18, "7 million" 7,000,000, "not 5"
    and "5 or 6" nothing. A percentage equals percentages only.
    """
    return float(any(same(stated(answer), stated(gold)) for gold in golds))


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

    def one(words: Sequence[str], accepted: Sequence[str]) -> float:
        return _f1(words, accepted) if 2 * _overlap(words, accepted) > len(words) else 0.0

    return max((one(words, accepted) for words, accepted in _sides(answer, golds)), default=0.0)


def contains(answer: str, golds: Sequence[str]) -> float:
    """1 if the words of an accepted answer stand in it, in a row."""
    found = 0.0
    for words, accepted in _sides(answer, golds):
        size = len(accepted)
        found = max(found, float(size > 0 and any(words[i : i + size] == accepted for i in range(len(words)))))
    return found


_SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": f1_of_one_answer,
    "numeric": numeric,
    "choice": choice,
    "contains": contains,
}
GRADES: tuple[Grade, ...] = (*METRICS, "contains")


def score(answer: str | None, golds: Sequence[str], metric: Grade) -> float:
    """What the answer earns, 0 to 1; no answer earns nothing.

    Raises:
        ValueError: unknown metric, or no accepted answer to compare with.
    """
    if metric not in _SCORERS:
        raise ValueError(f"metric {metric!r} is unknown; use one of {', '.join(_SCORERS)}")
    if isinstance(golds, str) or not golds:
        raise ValueError(f"gold is {golds!r}; it must be a list of at least one accepted answer")
    return 0.0 if answer is None else _SCORERS[metric](answer, golds)


def gold_problem(golds: Sequence[str], metric: Grade) -> str:
    """Why no answer can earn anything by this metric with these accepted answers; "" where one can."""
    if not any(gold.strip() for gold in golds):
        return "it has no accepted answer (gold)"
    if metric == "numeric" and all(stated(gold) is None for gold in golds):
        return f"none of its accepted answers {list(golds)} states a number"
    return ""


def _sides(answer: str, golds: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """The words of the answer and of each accepted answer, to be compared with each other."""
    words = _comparable(answer)
    for accepted in map(_comparable, golds):
        if _currencies(words) and _currencies(accepted):
            yield words, accepted
        else:
            yield _without_currencies(words), _without_currencies(accepted)


def _comparable(text: str) -> list[str]:
    return (normalise(text) or text.strip().casefold()).split()


def _currencies(words: Sequence[str]) -> bool:
    return any(_CURRENCY.search(word) for word in words)


def _without_currencies(words: list[str]) -> list[str]:
    if not _currencies(words):
        return words
    return [word for word in (_CURRENCY.sub("", word) for word in words) if word] or words


def _overlap(words: Sequence[str], accepted: Sequence[str]) -> int:
    return sum((Counter(words) & Counter(accepted)).values())


def _f1(words: Sequence[str], accepted: Sequence[str]) -> float:
    common = _overlap(words, accepted)
    return 2 * common / (len(words) + len(accepted)) if common else 0.0


def _letter(text: str) -> str:
    match = _LETTER.match(text.strip())
    return match.group(1).upper() if match else ""
