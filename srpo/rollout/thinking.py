"""Chat templates that open `<think>` in the prompt: a completion then begins inside the reasoning.

R1 distillations and Qwen3-Thinking end their generation prompt with `<think>`, so that what they sample is
`why</think><route>a</route>`. Whoever reads such a completion reads it with the tag before it, as the model did. A
template that opens *and closes* an empty block (Qwen3 with `enable_thinking: false`) leaves nothing open.
"""

from collections.abc import Sequence
from typing import Any

THINK, CLOSED = "<think>", "</think>"
_TAIL = 16
"""Ids at the end of a prompt that are looked at: the tag, however it is cut into tokens, and white space."""


def opened_in(prompt: str) -> str:
    """The think tag that a rendered prompt ends with, white space aside; "": it leaves none open."""
    return THINK if prompt.rstrip().endswith(THINK) else ""


def opened_by(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """`opened_in` for a prompt's ids.

    Raises:
        ValueError: the tag is a special token, so that no text of a completion would show where the reasoning ends.
    """
    opened = opened_in(tokenizer.decode(list(prompt_ids[-_TAIL:]), skip_special_tokens=False))
    if opened and {THINK, CLOSED} & set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the chat template opens {THINK} in the prompt and the tokenizer has {THINK} or {CLOSED} as a special "
            "token, which texts do not show: make them ordinary added tokens, or use a template that opens no block "
            "(often chat_template_kwargs: {enable_thinking: false})"
        )
    return opened


def inside(opened: str, text: str) -> str:
    """The text without the tag that its prompt has opened already, as the policy would write it."""
    return text.removeprefix(opened).lstrip() if opened else text


def unfinished(opened: str, text: str) -> str:
    """A completion with the tag that its prompt opened, where the completion closes it."""
    return opened + text if CLOSED in text else text
