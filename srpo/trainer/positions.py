"""Padding that moves nothing: every forward pass counts a token's position from its sequence's first token.

Batches are padded on the left, so a column is not a position. Rotary and relative positions do not mind; a model with
absolute positions (GPT-2, GPT-Neo) must be told them, and one that cannot be told (Bart-like decoders) or that reads
padding as text cannot be trained on prompts of unequal length at all. Which kind a model is of is tried out.

One hook on the transformers model inside serves every pass there is: student, old and reference policy, teacher,
decisions among choices, replayed and audited passes, evaluation, and TRL's own loss.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PADDING = 8  # columns
_TOKENS = 8
_TRIES = 3


def positions_of(mask: Tensor) -> Tensor:
    """[B, S] of an attention mask: each token's place in its own sequence, from 0; 0 at padding before it."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def takes_positions(base: nn.Module) -> bool:
    """Whether the model's `forward` names `position_ids`."""
    return "position_ids" in inspect.signature(type(base).forward).parameters


def padding_matters(last_logits: Callable[[Tensor, Tensor], Tensor], config: Any, device: Any, within: float) -> bool:
    """Whether padding on the left changes what a model says next: in each of a few tries, by more than `within`.

    Args:
        last_logits: (ids [1, S], mask [1, S]) -> [1, V], of the token after the last one. Called equally often on
            every process, whatever it returns.
        within: share of the largest logit that counts as rounding.
    """
    text = config.get_text_config()
    words, pad = text.vocab_size, getattr(text, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(_TRIES):
        ids = torch.randint(words, (1, _TOKENS), generator=generator)
        ids = torch.where(ids == pad, (ids + 1) % words, ids) if pad is not None else ids
        padding = torch.full((1, _PADDING), int(ids[0, 0]) if pad is None else pad)
        mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
        alone = last_logits(ids.to(device), torch.ones_like(ids).to(device)).float()
        beside = last_logits(torch.cat([padding, ids], dim=1).to(device), mask.to(device)).float()
        moved.append(not torch.allclose(alone, beside, rtol=0.0, atol=within * float(alone.abs().max())))
    return all(moved)


def rounding(model: nn.Module) -> float:
    """What `padding_matters` may take for rounding where the answer is a refusal."""
    return 1e-2 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 1e-1


@torch.no_grad()
def settle_positions(model: nn.Module, base: Any, others: list[Any]) -> None:
    """Give `base` and `others`, models of its family, position ids in every pass that lacks them, if padding matters.

    Args:
        model: what is called: `base`, a transformers model, or its wrapper. In a sharded engine all ranks call this.

    Raises:
        ValueError: padding changes what the model says, and position ids do not help or are not taken.
    """
    device = next(base.parameters()).device

    def last_logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]

    training = model.training
    model.eval()
    try:
        if not padding_matters(last_logits, base.config, device, within=1e-3):
            return
        takes = takes_positions(base)
        if takes:
            for one in (base, *others):
                one.register_forward_pre_hook(_count_positions, with_kwargs=True)
        if padding_matters(last_logits, base.config, device, within=rounding(base)):
            why = "and its position_ids do not change that" if takes else "and takes no position_ids"
            raise ValueError(
                f"{type(base).__name__} counts or reads padding as text {why}: prompts of unequal length would be "
                "trained on wrongly; use another model"
            )
    finally:
        model.train(training)


def _count_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    # A function of the module only: copies of the model carry the hook along.
    mask = kwargs.get("attention_mask")
    tokens = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None), None)
    if kwargs.get("position_ids") is not None or tokens is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return args, {**kwargs, "position_ids": positions_of(mask)[:, -tokens.size(1) :]}
