"""The reference policy of the KL penalty (beta > 0): the weights that the run was given, wherever they came from.

    the policy was given as          its reference is
    a name or a path                 a second model, read from there
    a model                          a copy of that very model
    a model and a new adapter        the policy without its adapter, where that is what was given
    a model that has an adapter      the values that its training weights began with (`srpo.trainer.other_weights`)

TRL reads the reference of a model from the path that its configuration names: after a warm start the penalty would
pull back to before it, and a model made in memory has no path. Of an adapter it copies what is named "default", and
that copy lands in the policy's files.

A checkpoint holds the reference too (`reference.safetensors`), unless it is the policy without its adapter: a resumed
run has the one that the first run had, also where the model it was given by then is another one, and where
`sync_ref_model` has moved it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer

from srpo.teacher.teacher import plain_copy
from srpo.trainer.engines import load_whole, save_whole
from srpo.trainer.loss import sequences
from srpo.trainer.other_weights import OtherWeights
from srpo.trainer.precision import engine_keeps_masters

WEIGHTS = "reference.safetensors"

_LEAVES_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA adapter that leave the weights below it alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...)
move a part of them into the adapter, so that the model without it is not the one that was given."""
_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class Reference:
    """The reference policy of a trainer.

    Args:
        model: the policy.
        ref_model: TRL's second model, if it has one.
        own: whether the reference of a PEFT policy is what its training weights began with (`reference_of`).

    Attributes:
        weights: those; None where the reference is a model, or the policy without adapter.
    """

    def __init__(self, model: Any, ref_model: Any, own: bool, accelerator: Accelerator):
        self.model, self.ref_model, self.accelerator = model, ref_model, accelerator
        self.weights = OtherWeights(model) if own else None
        self._begun = not own

    def begin(self) -> None:
        """Call when training begins: engines may only now have given all ranks the same weights to start from."""
        if not self._begun:
            self.weights = OtherWeights(self.accelerator.unwrap_model(self.model))
        self._begun = True

    @contextmanager
    def in_place_of_trls(self, trainer: Any) -> Iterator[None]:
        """Around TRL's scoring, which would take the model without its adapter for the reference."""
        beta = trainer.beta
        if self.weights is not None:
            trainer.beta = 0.0
        try:
            yield
        finally:
            trainer.beta = beta

    def logps(self, batch: dict[str, Any], score: Callable[..., Any], args: Any) -> dict[str, Tensor]:
        """[B, T] of a batch under `weights`, by the trainer's own scoring, under the name that TRL's have; empty where
        TRL's are right."""
        if self.weights is None:
            return {}
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        extra = {name: batch[name] for name in _INPUTS if name in batch}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs),
            self.weights.put_into(self.accelerator.unwrap_model(self.model)),
        ):
            scored: Tensor = score(self.model, *sequences(batch), batch_size=size, **extra)[0]
        return {"ref_per_token_logps": scored}

    def save(self, folder: str) -> None:
        """Write it into a checkpoint folder; every rank calls this, the main one writes."""
        if self.weights is None and self.ref_model is None:
            return
        values = self.accelerator.get_state_dict(self.ref_model) if self.weights is None else self.weights.values
        save_whole(values, Path(folder) / WEIGHTS, self.accelerator)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises FileNotFoundError for a checkpoint without a reference."""
        if self.weights is None and self.ref_model is None:
            return
        path = Path(folder) / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was written without beta > 0, or by an older version, and holds "
                "no reference policy; resume with the recipe that wrote it, or start a new run from its weights"
            )
        if self.weights is not None:
            self.weights.load(load_file(path), path)
            self._begun = True
        else:
            load_whole(self.accelerator.unwrap_model(self.ref_model), load_file(path))


@contextmanager
def reference_of(model: Any, new_adapter: Any, args: Any) -> Iterator[bool]:
    """Around the constructor of TRL's trainer: it makes the reference above, or none.

    Args:
        model: as it is given to the trainer.
        new_adapter: its `peft_config`.

    Yields:
        Whether the trainer must keep what the weights that train began with.

    Raises:
        ValueError: `sync_ref_model` with a PEFT policy.
    """
    beta = args.beta
    own_adapter = not isinstance(model, str) and is_peft_model(model)
    if beta == 0.0 or not (own_adapter or new_adapter is not None):
        with _own_reference(model, not engine_keeps_masters(args)) if beta else nullcontext():
            yield False
        return
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model moves a second model, and the reference of a PEFT policy is none: set sync_ref_model: "
            "false, or train all weights"
        )
    args.beta = 0.0  # TRL's way of keeping a reference for PEFT is not wanted
    try:
        yield own_adapter or not _without_it_as_given(new_adapter)
    finally:
        args.beta = beta


def _without_it_as_given(config: Any) -> bool:
    """Whether a policy with a new adapter of this kind is, without it, the model that was given, and stays so."""
    base_kept = getattr(config, "init_lora_weights", True) in _LEAVES_BASE
    return base_kept and getattr(config, "bias", "none") == "none"  # biases that train have no other values


@contextmanager
def _own_reference(model: str | PreTrainedModel, in_fp32: bool) -> Iterator[None]:
    """Inside, TRL's reference is a copy of `model`, or what its path holds, and in the precision that the policy has.

    In another one the penalty would pull at the first step already, towards the rounding of the same weights.
    """
    read = grpo_trainer.create_model_from_path
    reference = None if isinstance(model, str) else plain_copy(model).requires_grad_(False).eval()
    policy_is_read = reference is not None

    def create(*args: Any, **kwargs: Any) -> PreTrainedModel:
        nonlocal policy_is_read
        if not policy_is_read:  # TRL reads a policy that was given by name first, in the same way
            policy_is_read = True
            return read(*args, **kwargs)
        made = read(*args, **kwargs) if reference is None else reference
        return made.float() if in_fp32 else made

    grpo_trainer.create_model_from_path = create
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = read
