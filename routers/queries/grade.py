"""Grades a reply: one answer is extracted from it by fixed rules, and only that answer is compared with the gold.

Because exactly one answer is extracted, a reply that lists many candidates earns nothing by listing them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_COPULA = re.compile(r"\s(?:is|are|was|would be|will be|means)\s|[:=]\s*|\bin\s(?=the year)")
_TRAILER = re.compile(r",? (?:which|because|since|located|and (?:it|is))\b.*| \(.*")
_ARTICLE = re.compile(r"(?:the|a|an)\s")
MAX_ANSWER_CHARS = 200


def grade(query: str, reply: str, gold: Sequence[str]) -> float:
    """1.0 if the answer extracted from ``reply`` is one of ``gold``, else 0.0.

    Numbers are compared by value when every gold is a number, otherwise text is compared after normalising.
    """
    numeric = all(_as_number(answer) is not None for answer in gold)
    answer = extract_answer(query, reply, numeric)
    if answer is None:
        return 0.0
    if numeric:
        value = _as_number(answer)
        return float(any(_same_value(value, _as_number(accepted)) for accepted in gold))
    return float(normalise_answer(answer) in {normalise_answer(accepted) for accepted in gold})


def extract_answer(query: str, reply: str, numeric: bool) -> str | None:
    """The one answer that ``reply`` gives to ``query``, or ``None`` when it gives none or several."""
    sentence = _first_sentence(reply)
    if not sentence:
        return None
    return _extract_number(query, sentence) if numeric else _extract_text(sentence)


def normalise_answer(text: str) -> str:
    """Case, accents, punctuation, articles and spacing removed; what is left decides equality."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    plain = re.sub(r"[^\w\s-]", " ", plain)
    words = plain.split()
    return " ".join(word for word in words if word not in ("the", "a", "an")) or " ".join(words)  # the letter "a"


def _first_sentence(reply: str) -> str:
    line = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    # A full stop ends a sentence only after a word of three or more letters or a digit: "St. Paul", "D.C." do not.
    sentence = re.split(r"(?<=[^\W_]{3})[.!?]\s|(?<=\d)[.!?]\s", line, maxsplit=1)[0]
    return sentence.rstrip(" .!").strip()


def _extract_number(query: str, sentence: str) -> str | None:
    if "=" in sentence:
        sentence = sentence.rsplit("=", 1)[1]
    found = [text.rstrip(",").replace(",", "") for text in _NUMBER.findall(sentence)]
    if not found:
        found = [str(_SMALL.index(word)) for word in re.findall(r"[a-z]+", sentence.casefold()) if word in _SMALL]
    asked = {text.rstrip(",").replace(",", "") for text in _NUMBER.findall(query)}
    new = [text for text in dict.fromkeys(found) if text not in asked]
    if len(new) > 1:
        return None
    # A reply may repeat the numbers of the question; the answer is the new one, or the last when none is new.
    return new[0] if new else (found[-1] if found else None)


def _extract_text(sentence: str) -> str | None:
    parts = _COPULA.split(sentence)
    answer = _TRAILER.sub("", parts[-1])
    if len(parts) == 2 and _ARTICLE.match(answer.casefold()) and " of " in answer:
        answer = parts[0]  # "Paris is the capital of France": the answer comes first
    answer = answer.strip(" .!?'\"*`")
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", "")) if _NUMBER.fullmatch(text.strip()) else None
    except ValueError:
        return None


def _same_value(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and abs(first - second) <= 1e-6 * max(1.0, abs(second))
