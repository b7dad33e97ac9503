"""Before the first pass of a trainer: padding moves nothing, and training mode adds no noise that is not known of.

Padding. Batches are padded on the left, so a column is not a position. Rotary and relative positions do not mind; a
model with absolute positions (GPT-2, GPT-Neo) must be told them, and one that cannot be told (Bart-like decoders) or
that reads padding as text cannot be trained on prompts of unequal length at all. Which kind a model is of is tried
out. One hook on the transformers model inside serves every pass there is, TRL's own loss included.

Noise. The policy trains in training mode. Teacher and sampler compute without noise; the old policy, the reference of
a PEFT policy and recorded experts with a mask of their own. Each is compared with the student's pass token by token,
so noise passes for a difference between policies. With one and the same context for teacher and student the
distillation gradient must be 0; with dropout it was 40 % of the real one at LoRA dropout 0.05, and 46 % at attention
dropout 0.1.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging
from trl.models.utils import disable_gradient_checkpointing

logger = logging.get_logger(__name__)

_PADDING = 8  # columns
_TOKENS = 8
_TRIES = 3
NOTICEABLE = 1e-3  # nats
_ENDINGS = ("drop", "drop_path", "drop_prob", "drop_rate", "jitter", "jitter_noise", "jitter_eps")


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
        if alone.isnan().any():
            raise ValueError(
                "the policy's logits are NaN before any training: its weights are damaged (or its dtype overflows); "
                "load it from another checkpoint, or in another dtype"
            )
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


def still(model: nn.Module) -> dict[str, float]:
    """Set every rate of dropout, layer dropout and router jitter in a model to 0; what each name was at most.

    Not its configuration, which is saved with it. Modules of `torch.nn`, attributes that a forward hands to functional
    dropout or to attention, and rates by adapter.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if not _is_rate(type(module).__name__, name):
                continue
            if isinstance(value, dict):
                rates = {key: rate for key, rate in value.items() if _positive(rate)}
                value.update(dict.fromkeys(rates, 0.0))
            elif _positive(value):
                rates = {"": value}
                setattr(module, name, 0.0)
            else:
                continue
            label = "dropout" if name == "p" else name
            for rate in rates.values():
                found[label] = max(found.get(label, 0.0), float(rate))
    return found


@torch.no_grad()
def pass_noise(model: nn.Module, base: Any, checkpointing_kwargs: Any = None) -> float:
    """Mean |difference| of the log-probs of two passes over the same tokens, in training and in evaluation mode, nats.

    Weighted by the probabilities. In a sharded engine all ranks call it. The run's random state is left alone.
    """
    device = next(base.parameters()).device
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    training, passes = model.training, []
    try:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            disable_gradient_checkpointing(base, checkpointing_kwargs),
        ):
            for mode in (True, False):
                model.train(mode)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                passes.append(logits.float().log_softmax(-1))
    finally:
        model.train(training)
    noisy, quiet = passes
    return float(((noisy - quiet).abs() * quiet.exp()).sum(-1).mean())


def _is_rate(owner: str, name: str) -> bool:
    return "dropout" in name or name.endswith(_ENDINGS) or (name == "p" and "Drop" in owner)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


class ForwardChecks(TrainerCallback):
    """Both, at the end of a trainer's construction, when every model of it exists; what engines must help with, later.

    Args:
        model: the policy as the trainer calls it.
        models: the transformers model in it, and those of reference and teacher.
        args: has `disable_dropout` and `gradient_checkpointing_kwargs`.
        autocast: makes the context that the trainer's passes run in.
    """

    def __init__(self, model: nn.Module, models: Sequence[Any], args: Any, autocast: Callable[[], Any]) -> None:
        self.model, self.args, self.autocast = model, args, autocast
        self.base, *self.others = models
        # Weights that are still to be handed out or that lie in parts take the engine's help: when training begins.
        self.settled = not any(hasattr(p, "ds_id") or p.is_meta or isinstance(p, DTensor) for p in model.parameters())
        if self.settled:
            settle_positions(model, self.base, self.others)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.autocast():
            if not self.settled:
                settle_positions(self.model, self.base, self.others)
                self.settled = True
            self._measure_noise()

    def _measure_noise(self) -> None:
        noise = pass_noise(self.model, self.base, self.args.gradient_checkpointing_kwargs)
        if noise <= NOTICEABLE:
            return
        cure = "Set disable_dropout: true"
        if self.args.disable_dropout:
            cure = "disable_dropout does not reach it (neftune_noise_alpha? noise of this family's own?): turn it off"
        logger.warning(
            "In training mode the policy computes with noise: the log-probs of one text move by %.2g nats on average. "
            "Teacher, sampler, old and reference policy are compared with it token by token, so that a part of every "
            "gradient is this noise (40 %% of a distillation gradient at LoRA dropout 0.05). %s",
            noise,
            cure,
        )
