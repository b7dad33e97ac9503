"""What the self-teacher is shown: the question again, with a correct sibling and/or feedback.

Source: SDPO (arXiv:2601.20802) section 2 and App. C, lasgroup/SDPO ray_trainer.py:611-782; SRPO (arXiv:2604.02288)
section 3.1 and Listing 5. Ours: only the demonstration or the feedback is ever cut (the published code cuts the whole
prompt, losing the question or the instruction), and control tokens spelled out in either are defused.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Rollout:
    """What the other ranks need to know of one completion."""

    text: str
    """The completion, decoded; "" unless it is a possible demonstration."""
    correct: bool
    truncated: bool
    reward: float
    feedback: str


@dataclass(frozen=True)
class Templates:
    reprompt: str
    solution: str
    feedback: str


def choose_demonstrations(rollouts: Sequence[Rollout], group_size: int, how: str, seed: str) -> list[int | None]:
    """For each rollout the index of the correct sibling that its teacher sees, or None.

    Groups are `group_size` consecutive rollouts, in the gathered order of all ranks. A rollout is never its own
    demonstration, and a truncated one is nobody's. `how`: "first" by index (the papers), "random", or "best", the
    highest reward, first on ties. Random choices are drawn by (seed, group, member), so they do not depend on history.
    """
    chosen: list[int | None] = []
    for i in range(len(rollouts)):
        start = i - i % group_size
        group = range(start, min(start + group_size, len(rollouts)))
        siblings = [j for j in group if j != i and rollouts[j].correct and not rollouts[j].truncated]
        if not siblings:
            chosen.append(None)
        elif how == "random":
            chosen.append(random.Random(f"{seed}:{start}:{i}").choice(siblings))
        elif how == "best":
            chosen.append(max(siblings, key=lambda j: (rollouts[j].reward, -j)))
        else:
            chosen.append(siblings[0])
    return chosen


def strip_thinking(text: str) -> str:
    """The text without its `<think>...</think>` blocks."""
    return _THINKING.sub("", text).strip()


def defuse(text: str, special_tokens: Iterable[str]) -> str:
    """Break every control token spelled out in `text`, so that it stays text when it is encoded again."""
    for token in sorted(special_tokens, key=len, reverse=True):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def reprompt(prompt: Prompt, demonstration: str | None, feedback: str | None, templates: Templates) -> Prompt:
    """The teacher's prompt: the original with its last user turn rebuilt from the templates."""
    solution = "" if demonstration is None else _fill(templates.solution, successful_previous_attempt=demonstration)
    notes = "" if feedback is None else _fill(templates.feedback, feedback_raw=feedback)
    if isinstance(prompt, str):
        return _fill(templates.reprompt, prompt=prompt, solution=solution, feedback=notes)
    if prompt[-1]["role"] != "user":
        raise ValueError(f"the last message of a prompt must be the user's, not {prompt[-1]['role']!r}'s")
    content = _fill(templates.reprompt, prompt=prompt[-1]["content"], solution=solution, feedback=notes)
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def teacher_prompt_ids(
    told: Sequence[tuple[Prompt, str | None, str | None]],
    templates: Templates,
    tokenize: Callable[[list[Prompt]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[list[int]]:
    """Token ids of the teacher's prompts, each at most `max_length` where a cut can achieve it.

    Args:
        told: prompt, demonstration and feedback of each. The end of a demonstration (its answer) and the start of a
            feedback text survive a cut.
        tokenize: prompts -> their ids.
    """
    # Some tokenizers name only a few of their control tokens (Llama 3: not its header tokens).
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials.update(tokenizer.all_special_tokens)

    def safe(text: str | None) -> str | None:
        return None if text is None else defuse(text, specials)

    rest = [(prompt, safe(demonstration), safe(feedback)) for prompt, demonstration, feedback in told]
    found: list[list[int]] = [[] for _ in rest]
    open_rows = list(range(len(rest)))
    while open_rows:
        asked = tokenize([reprompt(*rest[i], templates) for i in open_rows])
        still = []
        for i, ids in zip(open_rows, asked, strict=True):
            found[i], (prompt, demonstration, feedback) = ids, rest[i]
            excess = len(ids) - max_length
            if excess <= 0 or not (demonstration or feedback):
                continue
            if demonstration:
                demonstration = _cut(demonstration, excess, tokenizer, keep_end=True)
            else:
                feedback = _cut(feedback or "", excess, tokenizer, keep_end=False)
            rest[i] = (prompt, demonstration, feedback)
            still.append(i)
        open_rows = still
    return found


def _cut(text: str, excess: int, tokenizer: PreTrainedTokenizerBase, keep_end: bool) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = ids[excess:] if keep_end else ids[: max(len(ids) - excess, 0)]
    shorter = tokenizer.decode(kept)
    # Decoding a cut id sequence may give text that encodes to as many ids again: always lose at least one character.
    return shorter if len(shorter) < len(text) else text[1:] if keep_end else text[:-1]


def _fill(template: str, **slots: str) -> str:
    # Not str.format: demonstrations and templates may hold braces.
    pattern = re.compile("|".join(re.escape("{" + name + "}") for name in slots))
    return pattern.sub(lambda match: slots[match.group()[1:-1]], template)
