"""Members that think aloud: what of a text is their reasoning, and what their answer."""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|seed:think"
_MARK = re.compile(
    rf"(?P<open><\s*(?:{_NAMES})\s*>|\[THINK\]|◁think▷)|<\s*/\s*(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷", re.IGNORECASE
)
"""How models mark their reasoning."""


def split_reasoning(text: str) -> tuple[str, str]:
    """(answer, reasoning), both stripped. A text without marks is an answer as it is. Linear time.

    - Blocks ``<think> ... </think>`` are reasoning, wherever they stand; what is around them is the answer.
    - Where a closing mark comes before any opening one, the template of the member's prompt has opened it: all before
      is reasoning. A closing mark later on, with nothing open, is a part of the answer.
    - A block without an end is reasoning to the end if nothing but blocks stands before it on its line (the reply was
      cut while it thought); elsewhere it is an answer that speaks of the mark.
    """
    answer: list[str] = []
    reasoning: list[str] = []
    position, opened, first = 0, None, True
    for mark in _MARK.finditer(text):
        if opened is None and mark["open"]:
            opened = mark
        elif opened is None and first:
            reasoning.append(text[: mark.start()])
            position = mark.end()
        elif opened is not None and not mark["open"] and _name(mark) == _name(opened):
            answer.append(text[position : opened.start()])
            reasoning.append(text[opened.end() : mark.start()])
            position, opened = mark.end(), None
        first = False
    if opened is not None and not text[position : opened.start()].rpartition("\n")[2].strip():
        answer.append(text[position : opened.start()])
        reasoning.append(text[opened.end() :])
        position = len(text)
    if not reasoning:
        return text, ""
    answer.append(text[position:])
    return _joined(answer), _joined(reasoning)


def _name(mark: re.Match[str]) -> str:
    return re.sub(r"[\s/]", "", mark.group().lower())


def _joined(pieces: list[str]) -> str:
    return "\n".join(piece.strip() for piece in pieces if piece.strip())
