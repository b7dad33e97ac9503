"""Finds the MoE routers of a `transformers` model, and what their choices look like. Nothing per model family."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from srpo.replay.expert_table import RouterSpec

# The same two numbers have many names. Read from the router, then from the configuration, never from a weight's
# shape: under ZeRO-3 that is (0,). LongCat's router calls all choices, zero experts included, n_routed_experts.
_TOP_K = ("top_k", "moe_topk", "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def find_routers(model: nn.Module) -> tuple[PreTrainedModel, list[list[nn.Module]], RouterSpec]:
    """The routers that `model` itself registers for ``output_router_logits``.

    Args:
        model: bare or wrapped (PEFT, FSDP, DeepSpeed, `torch.compile`).

    Returns:
        The smallest `PreTrainedModel` around all routers (one call of it fires each router once); per router, in the
        order of the layers, its modules (more than one where PEFT keeps a copy per adapter); their description.

    Raises:
        ValueError: no router, none that can be told apart from its block, or a choice that differs between layers.
    """
    classes, others = _router_classes(model)
    places: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, classes) and not _is_skipped(name):
            places.setdefault(re.sub(r"\.modules_to_save\.[^.]+|\.base_layer", "", name), []).append(module)
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no MoE router that routing replay can hook: {_why_none(classes, others)}. "
            "Set routing_replay to off."
        )
    decoder = _smallest_around(model, [m for modules in places.values() for m in modules])
    config = decoder.config.get_text_config()
    choices = {(_number(m, config, _TOP_K), _number(m, config, _EXPERTS)) for ms in places.values() for m in ms}
    if len(choices) > 1:
        raise ValueError(f"layers choose differently, (experts per token, experts): {sorted(choices)}; not supported")
    top_k, experts = choices.pop()
    if not 0 < top_k < experts:
        raise ValueError(f"{top_k} of {experts} experts per token: there is nothing to replay")
    ordered = sorted(places.items(), key=lambda place: _layer(place[0]))
    layers = tuple(_layer(name) for name, _ in ordered)
    return decoder, [modules for _, modules in ordered], RouterSpec(layers, config.num_hidden_layers, top_k, experts)


def _router_classes(model: nn.Module) -> tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]:
    """What the model registers as the source of its router logits: routers, and other modules."""
    classes: set[type[nn.Module]] = set()
    others: set[type[nn.Module]] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                target = getattr(recorder, "target_class", recorder)
                # Some families register the whole block or attention; its inside may hold more than one selection.
                if isinstance(target, type):
                    (classes if re.search("Rout|Gat", target.__name__) else others).add(target)
    return tuple(classes), tuple(others)


def _why_none(classes: tuple[type[nn.Module], ...], others: tuple[type[nn.Module], ...]) -> str:
    routers, blocks = (", ".join(sorted(one.__name__ for one in some)) for some in (classes, others))
    if classes:
        return (
            f"none of its layers has a {routers}, which its family routes with (every layer is dense, or looks its "
            "experts up without a choice)"
        )
    if others:
        return f"its family has no router of its own to hook, only {blocks}, which chooses experts somewhere inside"
    return "its class registers none as router_logits (dense models have none)"


def _is_skipped(name: str) -> bool:
    """PEFT's untrained twin, and the layers of multi-token prediction, which restart at layer 0."""
    parts = name.split(".")
    return "original_module" in parts or any(re.search("^(mtp|nextn|draft)", part) for part in parts)


def _layer(name: str) -> int:
    numbers = re.findall(r"layers\.(\d+)\.", name)
    if not numbers:
        raise ValueError(f"cannot tell the decoder layer of the router {name!r}: no 'layers.N' in its name")
    return int(numbers[-1])


def _smallest_around(model: nn.Module, routers: list[nn.Module]) -> PreTrainedModel:
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and set(routers) <= set(module.modules())
    ]
    if not around:
        raise ValueError(f"{type(model).__name__} holds no transformers model around its routers")
    return around[-1]  # modules() goes from the outside to the inside


def _number(router: nn.Module, config: Any, names: tuple[str, ...]) -> int:
    for source in (router, getattr(router, "config", None), config):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    raise ValueError(f"unsupported family: {type(router).__name__} and its configuration lack {', '.join(names)}")
