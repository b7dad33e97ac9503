"""What a checkpoint of the trainer core holds beyond TRL's, so that 4 + 4 steps are the 8 steps of one run, bitwise.

the teacher                    teacher.safetensors, by `srpo.teacher.teacher`
the reference policy           reference.safetensors, by `srpo.trainer.reference`
the rest of a generation batch rollouts_<rank>.safetensors, where a checkpoint falls inside one (`srpo.trainer.buffer`)
the environment                environment_<rank>.json: its ledger and budgets, and the streak of lost batches
what belongs to the weights    whatever the trainer's `save_beside` writes, also beside the last weights and on the Hub
the clock                      where in a generation batch and in the data's order the run is, from the step number
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from srpo.objectives import Head
from srpo.trainer.buffer import load_nested, save_nested
from srpo.trainer.engines import saved_whole
from srpo.trainer.moe_checkpoint import load_renamed_weights

_HEAD_PARTS = ("weight", "bias", "softcap", "scale")


class ResumeMixin:
    """Saving and resuming, for `srpo.trainer.trainer.SRPOTrainer`; it reads and sets that class's attributes."""

    accelerator: Any
    args: Any
    environment: Any
    model: Any
    state: Any
    teacher: Any
    save_beside: Callable[[str], object] | None = None
    """Called with every folder that the weights were written to, before it is pushed: checkpoints, and the end."""
    _buffered_inputs: Any
    _get_output_dir: Any
    _last_loaded_step: int
    _losses: Any
    _step: int
    _teacher_head: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with saved_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.save_beside is not None:
            self.save_beside(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.teacher is not None:
            self.teacher.save(folder)
        if self.environment is not None and not self.args.save_only_model:
            state = {"environment": self.environment.state_dict(), "lost_batches": self._losses.streak}
            self._environment_path(folder).write_text(json.dumps(state), encoding="utf-8")
        # Inside a generation batch: the rest of it is still to be trained on.
        if self._step % self._generate_every != 0 and not self.args.save_only_model:
            head = self._teacher_head if self.teacher is not None and self.teacher.snapshots_head else None
            parts = None if head is None else {key: getattr(head, key) for key in _HEAD_PARTS}
            save_nested({"batches": self._buffered_inputs, "head": parts}, self._rollouts_path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_experts(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_experts(self.state.best_model_checkpoint)
        self._last_loaded_step = -1  # of vLLM: these are not the weights of this step any more

    def _load_experts(self, folder: str) -> None:
        # Sharded weights have their own format, under the model's own names.
        if self.accelerator.distributed_type not in ("DEEPSPEED", "FSDP") and not is_peft_model(self.model):
            load_renamed_weights(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _refuse_other_world_size(checkpoint, self.accelerator.num_processes)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.teacher is not None:
            self.teacher.load(checkpoint)
        if self.environment is not None:
            self._load_environment(checkpoint)
        path = self._rollouts_path(checkpoint)
        if path.exists():
            rest = load_nested(path, self.accelerator.device)
            self._buffered_inputs = rest["batches"]
            if self.teacher is not None:
                self._teacher_head = self.teacher.head() if rest["head"] is None else Head(**rest["head"])

    @property
    def _generate_every(self) -> int:
        """Micro-steps that one generation batch feeds."""
        return self.args.steps_per_generation * self.args.num_iterations

    def _rollouts_path(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_{self.accelerator.process_index}.safetensors"

    def _environment_path(self, folder: str) -> Path:
        return Path(folder) / f"environment_{self.accelerator.process_index}.json"

    def _load_environment(self, checkpoint: str) -> None:
        path = self._environment_path(checkpoint)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was not written by a run with an environment; resume with the "
                "recipe that wrote it, or start a new run from its weights"
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        self.environment.load_state_dict(state["environment"])
        self._losses.streak = state["lost_batches"]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler


class GenerationClock(TrainerCallback):
    """Moves the teacher after the last optimiser step of a generation batch, and sets the clocks on resume."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL counts micro-steps from 0 in each process; a resumed run must know where in a generation batch it is.
        trainer = self.trainer
        if trainer.teacher is not None:
            trainer.teacher.begin()
        trainer._step = state.global_step * args.gradient_accumulation_steps
        # TRL's sampler draws one permutation per epoch; a resumed run must not start with the first epoch's again.
        sampler = trainer._train_sampler
        if sampler is not None and sampler.shuffle:
            for _ in range(int(state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.teacher is not None and trainer._step % trainer._generate_every == 0:
            trainer.teacher.update()


def _refuse_other_world_size(checkpoint: str, processes: int) -> None:
    # transformers writes one random state per process, and would silently skip the missing ones.
    wrote = len(list(Path(checkpoint).glob("rng_state_*.pth"))) or 1
    if wrote != processes and any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} was written by {wrote} processes and this run has {processes}: rollouts and random states "
            f"belong to a process, so resume with {wrote}, or start a new run from its weights"
        )
