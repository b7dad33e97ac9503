"""Grades a reply: one answer is extracted from it by fixed rules, and only that answer is compared with the gold.

Because exactly one answer is extracted, a reply that lists many candidates earns nothing by listing them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from routers.data.written_numbers import SCALE, Written, find, readable, rewritten, same

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_COPULA = re.compile(r"\s(?:is|are|was|would be|will be|means)\s|[:=]\s*|\bin\s(?=the year)")
_TRAILER = re.compile(r",? (?:which|because|since|and (?:it|is))\b.*|, (?:located|but)\b.*| \(.*")
_ARTICLE = re.compile(r"(?:the|a|an)\s")
MAX_ANSWER_CHARS = 200
_DENIED = re.compile(r"(?:\bnot|n['’]t)\s+(?:be\s+)?$", re.IGNORECASE)
FAILURE = "Error: "  # how the reply of a member that failed begins; what it quotes is no answer


def grade(query: str, reply: str, gold: Sequence[str]) -> float:
    """1.0 if the answer extracted from ``reply`` is one of ``gold``, else 0.0.

    Numbers are compared by value when every gold is a number, otherwise text is compared after normalising.
    """
    numeric = are_numbers(gold)
    answer = extract_answer(query, reply, numeric)
    if answer is None:
        return 0.0
    if numeric:
        return float(any(same(_as_number(answer), _as_number(accepted)) for accepted in gold))
    return float(normalise_answer(answer) in {normalise_answer(accepted) for accepted in gold})


def are_numbers(gold: Sequence[str]) -> bool:
    """Whether every accepted answer is a number, so that a reply's answer is one too."""
    return all(_as_number(answer) is not None for answer in gold)


def extract_answer(query: str, reply: str, numeric: bool) -> str | None:
    """The one answer that ``reply`` gives to ``query``, or ``None`` when it gives none or several."""
    sentences = _sentences(reply)
    if not sentences or reply.startswith(FAILURE):
        return None
    if not numeric:
        return _extract_text(sentences[0])  # a name comes first, explanations follow
    # A number comes last, after the working.
    return next((n for n in (_extract_number(query, sentence) for sentence in reversed(sentences)) if n != ""), None)


def normalise_answer(text: str) -> str:
    """Case, accents, punctuation, a leading article and spacing removed; what is left decides equality.

    Numbers stay whole (`routers.data.written_numbers`): "1.5" is not "1 5", and "12:30" not "12 30".
    """
    words = rewritten(readable(unicodedata.normalize("NFC", text.casefold())), _plain).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def _plain(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^\w\s-]", " ", plain)


def _sentences(reply: str) -> list[str]:
    """Sentences of all lines. A full stop ends one only after three letters or a digit: "St. Paul", "D.C." do not."""
    pieces = re.split(r"(?<=[^\W_]{3})[.!?]\s|(?<=\d)[.!?]\s|\n", reply)
    return [text for text in (piece.strip().rstrip(" .!") for piece in pieces) if text]


def _extract_number(query: str, sentence: str) -> str | None:
    """The one number that ``sentence`` states; "" when there is no number in it, ``None`` when there are several."""
    if "=" in sentence:
        sentence = sentence.rsplit("=", 1)[1]
    found = _numbers(sentence)
    if not found:
        found = [str(_SMALL.index(word)) for word in re.findall(r"[a-z]+", sentence.casefold()) if word in _SMALL]
    if not found:
        return ""
    asked = {*_numbers(query), *re.findall(r"\d+", readable(query))}  # "7 * 7" asks about 7 too
    new = [text for text in dict.fromkeys(found) if text not in asked]
    if len(new) > 1:
        return None
    # A reply may repeat the numbers of the question; the answer is the new one, or the last when none is new.
    return new[0] if new else found[-1]


def _extract_text(sentence: str) -> str | None:
    parts = _COPULA.split(_TRAILER.sub("", sentence))
    answer = parts[-1]
    if len(parts) == 2 and _ARTICLE.match(answer.casefold()) and " of " in answer:
        answer = parts[0]  # "Paris is the capital of France": the answer comes first
    answer = answer.strip(" .!?'\"*`")
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _numbers(text: str) -> list[str]:
    """The numbers of a text as they are written, with a scale that follows ("7 million"), without denied ones."""
    text, found = readable(text), []
    for number in find(text):
        if not number.named and not _DENIED.search(text, 0, number.start):
            scale = SCALE.match(text, number.end)
            found.append(f"{number.currency}{number.text}{scale[0] if scale else ''}")
    return found


def _as_number(text: str) -> Written | None:
    """The number that is the whole text."""
    text = readable(text.strip())
    found = find(text)
    whole = len(found) == 1 and (found[0].start, found[0].end) == (0, len(text))
    return found[0] if whole and found[0].value is not None else None
