"""Tiny real MoE models of many families, and a spy that reads what their experts are given.

Every family that this file can build is a row of `FAMILIES`; the tests of `test_replay_families.py` run over all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from srpo.replay.replay import RoutingReplay
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request, Sample

VOCABULARY = 64
EXPERTS, TOP_K = 8, 2
_MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_QWEN = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# One dense layer before two MoE layers, two groups of four experts.
_DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}

# Chooses the tokens to attend to, more of them than there are here.
_INDEXED = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
_ONE_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

# family: (class of the model, settings); the configuration's class is the model's.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN | {"norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _QWEN),
    "olmoe": ("OlmoeForCausalLM", _QWEN | {"num_key_value_heads": 4}),
    "mixtral": ("MixtralForCausalLM", _LOCAL),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _DEEPSEEK | _LATENT),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _DEEPSEEK | _LATENT | {"topk_method": "group_limited_greedy"}),
    "gpt_oss": ("GptOssForCausalLM", _LOCAL),
    "granitemoe": ("GraniteMoeForCausalLM", _LOCAL),
    "glm4_moe": ("Glm4MoeForCausalLM", _DEEPSEEK),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 1,
            "num_hidden_layers": 3,
        },
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", _LOCAL),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {"num_experts": EXPERTS, "moe_topk": TOP_K}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        _QWEN | {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", _QWEN | _LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", _QWEN | _LINEAR),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        _LATENT
        | {
            "num_layers": 2,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 2,
            "moe_topk": TOP_K,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 16,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "dots1": ("Dots1ForCausalLM", _DEEPSEEK),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _DEEPSEEK | _LATENT),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _DEEPSEEK | _LATENT),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", _DEEPSEEK),
    "solar_open": ("SolarOpenForCausalLM", _DEEPSEEK),
    "exaone_moe": ("ExaoneMoeForCausalLM", _QWEN | {"num_hidden_layers": 3, "n_group": 4, "topk_group": 2}),
    "hy_v3": ("HYV3ForCausalLM", _QWEN | {"num_hidden_layers": 3}),
    "laguna": ("LagunaForCausalLM", _QWEN | {"num_hidden_layers": 3}),
    "mellum": ("MellumForCausalLM", _QWEN),
    "flex_olmo": ("FlexOlmoForCausalLM", _QWEN),
    "cohere2_moe": ("Cohere2MoeForCausalLM", _QWEN | {"layer_types": ["sliding_attention", "full_attention"]}),
    "minimax": ("MiniMaxForCausalLM", _LOCAL),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", _LOCAL | {"shared_intermediate_size": 16}),
    "aria_text": ("AriaTextForCausalLM", {"moe_num_experts": EXPERTS, "moe_topk": TOP_K}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", _LOCAL | _SLIDING),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", _DEEPSEEK | _LATENT | _INDEXED),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "axk1": ("AXK1ForCausalLM", _DEEPSEEK | _LATENT | _ONE_DENSE),
    "axk2": ("AXK2ForCausalLM", _DEEPSEEK | _LATENT | _ONE_DENSE | _INDEXED),
    "hy_v4": ("HYV4ForCausalLM", _DEEPSEEK | _LATENT | _ONE_DENSE | _INDEXED | {"hc_mult": 2}),
    "kolibri1": ("Kolibri1ForCausalLM", _QWEN | _SLIDING),
    "lara_mini": ("LaraMiniForCausalLM", _QWEN | _LINEAR | {"layer_types": ["linear_attention", "sliding_attention"]}),
    # The first layers are dense by default.
    "flint": ("FlintForCausalLM", _QWEN | {"num_hidden_layers": 4}),
    # The first layer looks its experts up by the token's id: nothing is chosen there.
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        _INDEXED
        | {
            "num_hidden_layers": 3,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 1,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "hc_mult": 2,
        },
    ),
}


def missing(family: str) -> str:
    """Why a family cannot be built here; empty if it can."""
    kind = FAMILIES[family][0]
    if hasattr(transformers, kind):
        return ""
    return f"{family}: transformers {transformers.__version__} has no {kind}"


def build(family: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of a family with random weights, float32, in evaluation mode."""
    name, own = FAMILIES[family]
    kind = getattr(transformers, name)
    chosen = _MODEL | own | settings
    if "num_layers" in chosen:
        del chosen["num_hidden_layers"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(kind.config_class(**chosen)).eval()
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.normal_(0, 0.02)  # selection biases start at 0, where they could not be seen
    return model


def experts_of(model: nn.Module, layers: Sequence[int] | None = None) -> list[nn.Module]:
    """The experts of each MoE layer, or of these, in the order of the layers."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(".experts")
        and "original_module" not in name
        and (layers is None or int(re.findall(r"layers\.(\d+)\.", name)[-1]) in layers)
    ]


@contextmanager
def spy(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[list[Tensor]]:
    """What each call of each experts module was told to run, ``[tokens, k]``, in the order of the calls."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dtype == torch.int64]
        assert len(given) == 1 and given[0].dim() == 2, f"{type(module).__name__} was given no expert ids"
        seen.append(given[0].clone())

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in experts_of(model, layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def perturb(model: nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Noise on every parameter, relative to its size: many tokens change their experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += scale * parameter.abs().mean() * noise


def sampled(
    model: nn.Module,
    replay: RoutingReplay,
    prompts: Sequence[Sequence[int]],
    new: int,
    ends: Sequence[int] = (),
    seed: int = 0,
    any_busy: Any = None,
    watched: Any = None,
) -> tuple[list[Tensor], list[Tensor], list[Sample], Any]:
    """By our own generator: ids [T] of each prompt and completion, their routes [T, L, k], and the samples.

    Args:
        watched: a context around the sampling; what it gives comes last.
    """
    how: dict[str, Any] = {"eos_ids": ends, "keep_tokens": None, "any_busy": any_busy}
    generator = TransformersGenerator(
        model, SimpleNamespace(pad_token_id=0, decode=str), Sampling(), recorder=lambda *told: recorder(*told), **how
    )
    with watched or nullcontext() as seen, replay.record_rows() as recorder:
        samples = generator.generate([Request(i, tuple(ids), f"{seed}:{i}", new) for i, ids in enumerate(prompts)])
        generator.finish()
    whole = [torch.tensor([*ids, *sample.ids]) for ids, sample in zip(prompts, samples, strict=True)]
    return whole, recorder.rows({i: len(ids) for i, ids in enumerate(whole)}), samples, seen


def right_aligned(sequences: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, S], padded on the left; `pad` columns more than the longest has tokens."""
    width = max(map(len, sequences)) + pad
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(2))
    for i, sequence in enumerate(sequences):
        ids[i, width - len(sequence) :] = sequence
        mask[i, width - len(sequence) :] = 1
    return ids, mask
