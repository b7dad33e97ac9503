"""Before the first pass of a trainer: padding moves nothing, and training mode adds no noise that is not known of."""

from typing import Any

from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from srpo.trainer.positions import settle_positions
from srpo.trainer.train_mode import NOTICEABLE, pass_noise, still

logger = logging.get_logger(__name__)


class ForwardChecksMixin:
    """`srpo.trainer.positions` and `srpo.trainer.train_mode`, for `srpo.trainer.trainer.SRPOTrainer`."""

    accelerator: Any
    add_callback: Any
    args: Any
    model: Any
    ref_model: Any
    teacher: Any
    _is_vlm: bool

    def _check_forwards(self) -> None:
        """At the end of construction: every model of the trainer exists."""
        if self.args.disable_dropout:
            for model in filter(None, (self.model, self.ref_model)):
                still(model)
        if self._is_vlm:
            return
        # Weights that are still to be handed out or that lie in parts take the engine's help: when training begins.
        whole = not any(hasattr(p, "ds_id") or p.is_meta or isinstance(p, DTensor) for p in self.model.parameters())
        if whole:
            self._settle_positions()
        self.add_callback(_AtStart(self, positions_are_settled=whole))

    def _settle_positions(self) -> None:
        others = [self.ref_model, None if self.teacher is None else self.teacher.model]
        bases = [self._inner(model) for model in others if model is not None]
        settle_positions(self.model, self._inner(self.model), bases)

    def _measure_noise(self) -> None:
        noise = pass_noise(self.model, self._inner(self.model), self.args.gradient_checkpointing_kwargs)
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

    def _inner(self, model: Any) -> Any:
        base = self.accelerator.unwrap_model(model)
        return base.get_base_model() if is_peft_model(base) else base


class _AtStart(TrainerCallback):
    def __init__(self, trainer: Any, positions_are_settled: bool):
        self.trainer = trainer
        self.positions_are_settled = positions_are_settled

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.trainer.accelerator.autocast():
            if not self.positions_are_settled:
                self.trainer._settle_positions()
                self.positions_are_settled = True
            self.trainer._measure_noise()
