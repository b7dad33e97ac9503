"""What the policy is shown between its turns: text of others, made harmless and framed.

Three layers keep such text from acting. The parsers read policy turns only; the rollout encodes an observation's body
without control or added tokens (`srpo.types.Observation`); and here, tags of the grammar that a text spells out lose
their angle brackets, so that neither a policy nor a later reader of the transcript takes them for ours.
"""

from __future__ import annotations

import re
import unicodedata

from routers.language.grammar import Grammar, Marks
from srpo.types import Observation

REASONING = "\n\nIts reasoning, to the end: "
"""Stands between a member's answer and the end of what it thought before."""
_LONGEST_TAIL = 64  # characters between a tag's name and its ">", such as attributes
_IGNORED = ("Cf", "Mn", "Me", "Cc")  # zero-width and other format characters, combining marks, controls


def neutralise(text: str, marks: Marks) -> str:
    """``text`` with every tag of these names in round brackets: ``</answer>`` becomes ``(/answer)``. Linear time.

    Also taken for tags: other case, white space or attributes inside, no closing bracket (a tag may be cut off at the
    end), full-width and other compatibility forms, and zero-width or combining characters in between.
    """
    plain, origin = _plain(text)
    names = "|".join(map(re.escape, marks.names))
    blanks = r"\s{0,8}"  # every repeat is bounded: linear on any text
    tag = re.compile(
        rf"<{blanks}(?:/{blanks})?(?:{names})(?![a-z0-9_-])(?:[^<>]{{0,{_LONGEST_TAIL}}}>)?", re.IGNORECASE
    )
    out = list(text)
    for match in tag.finditer(plain):
        out[origin[match.start()]] = "("
        if match.group().endswith(">"):
            out[origin[match.end() - 1]] = ")"
    return "".join(out)


def framed(text: str, marks: Marks, before: str, after: str, reasoning: str = "") -> Observation:
    """Text of others between a frame of ours, which is closed after the rollout has cut the text to size.

    ``reasoning`` is what a member thought aloud: its end is shown behind the answer, where there is room for it.
    """
    return Observation(
        body=neutralise(text, marks).strip(),
        before=before,
        after=after,
        aside=neutralise(reasoning, marks).strip(),
        between=REASONING if reasoning else "",
    )


def reply_observation(text: str, grammar: Grammar, reasoning: str = "") -> Observation:
    """A member's reply in the information frame of Router-R1."""
    opening, closing = grammar.open(grammar.information), grammar.close(grammar.information)
    return framed(text, grammar, f"\n\n{opening}", f"{closing}\n\n", reasoning)


def _plain(text: str) -> tuple[str, list[int] | range]:
    """``text`` as a look-alike hunter reads it, and for each of its characters the index in ``text``."""
    if text.isascii() and text.isprintable():
        return text, range(len(text))
    plain: list[str] = []
    origin: list[int] = []
    for i, character in enumerate(text):
        for part in unicodedata.normalize("NFKD", character):
            if part in "\t\n\r" or unicodedata.category(part) not in _IGNORED:
                plain.append(part)
                origin.append(i)
    return "".join(plain), origin
