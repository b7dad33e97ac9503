"""Tokenizers whose chat templates take tools: byte-level BPE of some hundred tokens, with templates of real models.

`real(name)` has the template that TRL ships of a model; `SMALL` is one of the same form (Hermes, as Qwen2.5) without
its preamble, for policies that are trained from nothing in seconds.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

from trl import chat_template_utils

from srpo.scratch_lm import train_tokenizer

HERMES = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SMALL = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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
