"""Language models small enough to be trained from nothing on a CPU in a minute: tokenizer and Qwen3-type networks.

Meant for quickstarts and tests. They are ordinary transformers objects: they save, reload and train like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
# ChatML; tools, their calls and results in Hermes' form, as Qwen2.5 has them. A prompt with its generation prompt is a
# prefix of the whole conversation, as supervised training needs it.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1500, whole: Sequence[str] = (), digits: int = 1
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template: any text encodes, and decodes to itself.

    Digits stand alone (or in groups of ``digits``), so that the few merges go into words. The same texts give the same
    tokenizer.

    Args:
        texts: what the model will read and write; training texts only.
        vocab_size: tokens in all; fewer if the texts hold fewer merges. At least the bytes and specials must fit.
        whole: strings that are always one token (tags, names; those of letters or digits where they are whole words).
            They are not special: decoding keeps them.
        digits: a number is cut from the left into groups of at most this many digits. A group that occurs often in the
            texts is one token, which makes numbers short that a policy has to repeat.

    Raises:
        ValueError: the vocabulary is too small for the bytes and the whole tokens.
    """
    floor = 256 + 3 + len(whole)
    if vocab_size < floor:
        raise ValueError(f"vocab_size {vocab_size} is too small; bytes and whole tokens alone are {floor}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(whole),
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The frame of the template occurs once per message: make its words cheap.
    tokenizer.train_from_iterator((part for text in texts for part in ("user\n", text, "assistant\n")), trainer)
    tokenizer.add_tokens(
        [
            # A member's name inside another word is no name.
            AddedToken(text, single_word=text[0].isalnum() and text[-1].isalnum(), normalized=False, special=False)
            for text in whole
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_causal_lm(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 192,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 384,
    positions: int = 1024,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights in fp32 and tied embeddings; the defaults give about 1M parameters.

    The weights start three times wider than Qwen3's 0.02, which suits widths of thousands: at these widths 0.02 leaves
    the question almost invisible at first, and a routing warm start needs three times as many epochs.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        hidden: width, divisible by ``heads``.
        layers, heads, intermediate: depth, attention heads (half as many key/value heads), width of the MLP.
        positions: longest sequence, tokens.
        seed: of the weights. The global random state is left as it was.

    Raises:
        ValueError: widths that do not fit.
    """
    config = Qwen3Config(intermediate_size=intermediate, **_common(tokenizer, hidden, layers, heads, positions))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def tiny_moe_lm(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    experts: int = 16,
    top_k: int = 4,
    intermediate: int = 64,
    positions: int = 1024,
    seed: int = 0,
) -> Qwen3MoeForCausalLM:
    """The same as a mixture of experts (Qwen3-MoE, every layer, weights renormalised); about 1.5M parameters.

    Args:
        tokenizer, hidden, layers, heads, positions, seed: as in `tiny_causal_lm`.
        experts, top_k, intermediate: experts per layer, how many of them a token uses, and the width of each.

    Raises:
        ValueError: widths that do not fit.
    """
    config = Qwen3MoeConfig(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=intermediate,
        intermediate_size=intermediate,  # of dense layers, which there are none of
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        **_common(tokenizer, hidden, layers, heads, positions),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(config)


def _common(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, positions: int
) -> dict[str, Any]:
    if hidden % heads or heads % 2:
        raise ValueError(f"hidden {hidden} must be a multiple of heads {heads}, and heads even")
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "dtype": "float32",
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
