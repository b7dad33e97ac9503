"""The five members. Each maps a batch of queries to replies; a member that fails says so and is simply wrong.

All use the same small language model and pay for every token they send through it.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from routers.quickstart.facts import passages
from routers.quickstart.grade import FAILURE
from routers.quickstart.members import embed, examples
from routers.quickstart.members.expression import ExpressionError, evaluate, show
from routers.quickstart.members.functions import FUNCTIONS, UNIT_WORDS
from routers.quickstart.members.lm import Completion, LanguageModel

CHAT_PREFIX = (
    "<|im_start|>system\nYou are a helpful assistant. Give a short, direct answer.<|im_end|>\n<|im_start|>user\n"
)
CHAT_SUFFIX = "{}<|im_end|>\n<|im_start|>assistant\n"
PYTHON_EXAMPLES = 4
LOOKUP_PASSAGES = 2


@dataclass(frozen=True)
class MemberReply:
    """What a member says, and the tokens that went through the language model for it."""

    reply: str
    prompt_tokens: int
    completion_tokens: int


def chat(model: LanguageModel, queries: list[str]) -> list[MemberReply]:
    """Chat template; a sentence from memory."""
    suffixes = [CHAT_SUFFIX.format(query) for query in queries]
    done = model.complete(CHAT_PREFIX, suffixes, max_tokens=48, one_line=False)
    return [MemberReply(c.text, c.prompt_tokens, c.completion_tokens) for c in done]


def fewshot(model: LanguageModel, queries: list[str]) -> list[MemberReply]:
    """Four fixed examples; a few words from memory."""
    prefix = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in examples.FEWSHOT)
    done = model.complete(prefix, [f"Q: {query}\nA:" for query in queries], max_tokens=24, one_line=True)
    return [MemberReply(c.text, c.prompt_tokens, c.completion_tokens) for c in done]


def calculator(model: LanguageModel, queries: list[str]) -> list[MemberReply]:
    """Writes one arithmetic expression after fixed examples; the expression is computed exactly."""
    prefix = "Write the calculation.\n" + "".join(f"Q: {q}\nC: {e}\n" for q, e in examples.CALCULATOR)
    done = model.complete(prefix, [f"Q: {query}\nC:" for query in queries], max_tokens=24, one_line=True)
    return [_computed(completion, {}) for completion in done]


def python(model: LanguageModel, queries: list[str]) -> list[MemberReply]:
    """Writes one expression after the examples most similar to the query; a restricted interpreter runs it."""
    questions = tuple(_pattern(question) for question, _ in examples.PYTHON)
    patterns = [_pattern(query) for query in queries]
    suffixes = []
    for query, chosen in zip(queries, embed.nearest(patterns, questions, PYTHON_EXAMPLES), strict=True):
        # The most similar example stands last, next to the query.
        shown = "".join(f"Q: {examples.PYTHON[i][0]}\n>>> {examples.PYTHON[i][1]}\n" for i in reversed(chosen))
        suffixes.append(f"{shown}Q: {query}\n>>>")
    prefix = "Write one Python expression that answers the question.\n"
    return [_computed(c, FUNCTIONS) for c in model.complete(prefix, suffixes, max_tokens=40, one_line=True)]


def _pattern(query: str) -> str:
    """The query without its numbers and names, so that examples are chosen by what is asked and not by the words."""
    query = re.sub(rf"\b({'|'.join(calendar.month_name[1:])}) \d+, \d+|\d+-\d+-\d+", "2000-01-01", query)
    query = re.sub(rf"\b({'|'.join(calendar.day_name)})\b", "Monday", query)
    query = re.sub(rf"\b({'|'.join(UNIT_WORDS)})\b", "feet", query).removesuffix(" (YYYY-MM-DD)")
    return re.sub(r"'\w+'", "'word'", re.sub(r"\b\d+\b(?!-)", "7", query))


def lookup(model: LanguageModel, queries: list[str]) -> list[MemberReply]:
    """Reads the passages of the reference most similar to the query, then answers in a few words."""
    prefix = "".join(_reading(notes, question) + f" {answer}\n" for notes, question, answer in examples.LOOKUP)
    suffixes = []
    for query, chosen in zip(queries, embed.nearest(queries, passages(), LOOKUP_PASSAGES), strict=True):
        suffixes.append(_reading(tuple(passages()[i] for i in chosen), query))
    done = model.complete(prefix, suffixes, max_tokens=24, one_line=True)
    return [MemberReply(c.text, c.prompt_tokens, c.completion_tokens) for c in done]


def _reading(notes: tuple[str, ...], question: str) -> str:
    return "Notes: " + " ".join(notes) + f"\nQ: {question}\nA:"


def _computed(completion: Completion, functions: Mapping[str, Callable[..., Any]]) -> MemberReply:
    source = completion.text.partition("=")[0].strip(" ?")  # models like to finish "2 + 3 = 5"; the tool computes
    try:
        reply = f"{source} = {show(evaluate(source, functions))}"
    except ExpressionError as error:
        reply = f"{FAILURE}could not compute {source!r} ({error})"
    return MemberReply(reply, completion.prompt_tokens, completion.completion_tokens)


MEMBERS: dict[str, Callable[[LanguageModel, list[str]], list[MemberReply]]] = {
    "fewshot": fewshot,
    "chat": chat,
    "calculator": calculator,
    "python": python,
    "lookup": lookup,
}
