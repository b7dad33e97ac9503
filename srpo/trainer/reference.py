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

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer

from srpo.teacher.teacher import plain_copy
from srpo.trainer.engines import load_whole
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


class ReferenceMixin:
    """The table above, for `srpo.trainer.trainer.SRPOTrainer`; it stands last before TRL's trainer.

    Attributes:
        reference: what a PEFT policy began with; None where the reference is a model, or the policy without adapter.
    """

    accelerator: Any
    args: Any
    model: Any
    ref_model: Any
    state: Any
    reference: OtherWeights | None = None
    _get_output_dir: Any
    _get_per_token_logps_and_entropies: Any
    _reference_is_set: bool = False

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        beta = args.beta
        given = inspect.signature(TRLGRPOTrainer).bind(model, reward_funcs, args, *rest, **kwargs)
        new_adapter = given.arguments.get("peft_config")
        own_adapter = not isinstance(model, str) and is_peft_model(model)
        if beta == 0.0 or not (own_adapter or new_adapter is not None):
            with _own_reference(model, not engine_keeps_masters(args)) if beta else nullcontext():
                super().__init__(model, reward_funcs, args, *rest, **kwargs)  # type: ignore[call-arg]
            return
        if args.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves a second model, and the reference of a PEFT policy is none: set sync_ref_model: "
                "false, or train all weights"
            )
        args.beta = 0.0  # TRL's way of keeping a reference for PEFT is not wanted
        try:
            super().__init__(model, reward_funcs, args, *rest, **kwargs)  # type: ignore[call-arg]
        finally:
            args.beta = beta
        self.beta = beta
        if own_adapter or not _without_it_as_given(new_adapter):
            self.reference = OtherWeights(self.model)
            self.add_callback(_AtStart(self))  # type: ignore[attr-defined]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.reference is None:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        beta, self.beta = self.beta, 0.0  # TRL's reference would be the model without its adapter
        try:
            batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        finally:
            self.beta = beta
        batch["ref_per_token_logps"] = self._reference_logps(batch)
        return batch

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor:
        assert self.reference is not None
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        extra = {name: batch[name] for name in _INPUTS if name in batch}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.reference.put_into(self.accelerator.unwrap_model(self.model)),
        ):
            length = batch["completion_ids"].size(1)
            return self._get_per_token_logps_and_entropies(
                self.model, ids, attention, length, batch_size=size, **extra
            )[0]

    # ------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.save_only_model or (self.reference is None and self.ref_model is None):
            return
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.reference is not None:
            values = self.reference.values
        else:
            values = self.accelerator.get_state_dict(self.ref_model)
        if self.accelerator.is_main_process:
            # Tied weights share memory, which safetensors refuses: every tensor is written on its own.
            save_file(
                {name: value.detach().clone().contiguous() for name, value in values.items()}, Path(folder) / WEIGHTS
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or (self.reference is None and self.ref_model is None):
            return
        path = Path(checkpoint) / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was written without beta > 0, or by an older version, and holds "
                "no reference policy; resume with the recipe that wrote it, or start a new run from its weights"
            )
        if self.reference is not None:
            self.reference.load(load_file(path), path)
            self._reference_is_set = True
        else:
            load_whole(self.accelerator.unwrap_model(self.ref_model), load_file(path))


class _AtStart(TrainerCallback):
    """Engines may only now have given all ranks the same weights to start from."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer._reference_is_set:
            trainer.reference = OtherWeights(trainer.accelerator.unwrap_model(trainer.model))
            trainer._reference_is_set = True


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
