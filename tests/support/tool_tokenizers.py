"""Tokenizers whose chat templates take tools: byte-level BPE of some hundred tokens, with templates of real models.

`real(name)` has the template that TRL ships of a model.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

from trl import chat_template_utils

from srpo.scratch_lm import train_tokenizer

HERMES = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
WITHOUT_TOOLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_with(template: str, texts: Iterable[str] = (), whole: Iterable[str] = HERMES, size: int = 400) -> Any:
    made = train_tokenizer(["user assistant question query name arguments", *texts], size, list(whole))
    made.chat_template = template
    return made


@cache
def real(name: str) -> Any:
    """With the template of TRL's `NAME_chat_template`; shared, so do not change it. End tokens are that model's."""
    end = {"llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "gptoss": "<|return|>"}.get(name, "<|im_end|>")
    made = tokenizer_with(getattr(chat_template_utils, f"{name}_chat_template"))
    made.add_special_tokens({"eos_token": end})
    if name.startswith("llama"):
        made.bos_token = "<|begin_of_text|>"
    return made
