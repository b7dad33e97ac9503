"""Tiny random models of many families, and micro-batches with something in common, for tests of shared prefixes."""

from typing import Any

import torch
import transformers
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from srpo.prefix.sharing import PrefixSharing
from srpo.teacher.lm_head import PolicyOutput, add_scoring_head

VOCABULARY = 60
LENGTH = 6  # of a completion, at most
TEMPERATURE = 0.8
_MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

# class of the model, settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_eager": ("LlamaForCausalLM", {"attn_implementation": "eager"}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", _MIXED | {"sliding_window": 6, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3ForCausalLM", _MIXED | {"sliding_window": 6}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6}),
    "mistral_wide": ("MistralForCausalLM", {"sliding_window": 60}),
    "phi": ("PhiForCausalLM", {"num_key_value_heads": 4}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 6}),
    "gpt2": ("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 0.5, "attention_multiplier": 0.3}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", _MIXED | {"sliding_window": 6}),
    "gpt_oss": (
        "GptOssForCausalLM",
        _MIXED | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS | {"norm_topk_prob": True}),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS | {"num_key_value_heads": 4}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """In training mode, with TRL's fused head."""
    name, own = FAMILIES[family]
    kind = getattr(transformers, name)
    chosen = {key: value for key, value in (_MODEL | own | settings).items() if value is not None}
    implementation = chosen.pop("attn_implementation", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = kind.config_class(**chosen)
        if implementation is not None:
            config._attn_implementation = implementation
        model = kind(config).to(dtype).train()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model


def shared(model: Any, mode: str = "on", **kwargs: Any) -> PrefixSharing:
    """Give a model its scoring head."""
    sharing = PrefixSharing(model, mode, **kwargs)
    add_scoring_head(model, sharing, TEMPERATURE)
    return sharing


def batch(left: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention, labels [B, P + T]: a system part, groups of 4, 2 and 1, in no order; ragged, one of no tokens.

    `left`: prompts are padded on the left, completions on the right; else all padding is on the right.
    """
    draw = torch.Generator().manual_seed(5)

    def some(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()

    system, width = some(5), 12
    prompts = [system + some(n) for n in (7, 4, 2)]
    group = [0, 1, 0, 2, 1, 0, 0]
    completions = [some(n) for n in (6, 3, 5, 4, 0, 6)]
    completions.append(completions[0][:3] + some(2))  # two completions begin alike
    ids = torch.zeros(len(group), width + LENGTH, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for b, (g, completion) in enumerate(zip(group, completions, strict=True)):
        begin = width - len(prompts[g]) if left else 0
        middle, end = begin + len(prompts[g]), begin + len(prompts[g]) + len(completion)
        ids[b, begin:end] = torch.tensor(prompts[g] + completion, dtype=torch.long)
        mask[b, begin:end] = 1
        labels[b, middle:end] = ids[b, middle:end]
    return ids, mask, labels


def score(model: Any, left: bool = True, **extra: Any) -> PolicyOutput:
    """As TRL and ours call it."""
    ids, mask, labels = batch(left)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # as `srpo.trainer.forward_checks` adds them where they matter
    extra.setdefault("position_ids", positions)
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **extra)


def gradients(model: Any, left: bool = True) -> dict[str, Tensor]:
    """Of a sum over log-probs and entropies in which every token counts otherwise."""
    model.zero_grad()
    output = score(model, left)
    weight = torch.linspace(0.5, 2.0, output.log_probs.numel()).view(output.log_probs.shape)
    (weight * output.log_probs + 0.1 * weight.flip(1) * output.entropy).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
