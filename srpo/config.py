"""Configuration of the trainer core: TRL's `GRPOConfig` plus what self-distillation and sample routing need.

The names are those of TRL's `GRPOConfig` and `SDPOConfig`; the defaults are the published settings of SRPO
(arXiv:2604.02288, Table 3) and SDPO (arXiv:2601.20802, Table 12), so any key you set is visibly your own choice.
Four defaults of TRL's differ here on purpose: `scale_rewards="none"` (both papers' baselines do not divide by the
standard deviation), `epsilon_high=0.28`, token-truncated importance weights of the sampler, at most 2, and
`disable_dropout=True` (srpo/trainer/forward_checks.py).
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import GRPOConfig

from srpo.objectives import objective_of
from srpo.ranges import Ranges, check_numbers
from srpo.redact import redacted
from srpo.replay.settings import check_replay
from srpo.rollout.sampling_rules import check_generation_kwargs
from srpo.run.batch import check_batch, processes_of_launch, settle_batch
from srpo.run.compiles import free_deepspeed
from srpo.settings import Settings, check_choices
from srpo.trainer.ranges import TRAINER_RANGES

logger = logging.get_logger(__name__)

SMALL_ALPHA = 0.01
"""Nearer than this to an end, but not at it, distillation_alpha leaves next to nothing of the divergence."""


@dataclass
class SRPOConfig(Settings, GRPOConfig):
    """Arguments of [`SRPOTrainer`]: every argument of TRL's `GRPOConfig`, and those of `srpo.settings`."""

    RANGES: ClassVar[Ranges] = {**TRAINER_RANGES, **Settings.RANGES}

    def __post_init__(self) -> None:
        check_numbers(self)  # before TRL divides by them
        self._check_device()
        settle_batch(self, processes_of_launch())
        free_deepspeed()
        super().__post_init__()
        chosen = bool(self.objective)
        self.objective = self.objective or "srpo"
        self.check(whole=chosen)  # of GRPOTrainer and SDPOTrainer the class says which objective it will be

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, which logs and W&B read; whatever looks like a secret is replaced, at any depth."""
        return redacted(super().to_dict())

    def _check_device(self) -> None:
        # TRL's default is bf16, which transformers refuses where there is no GPU, in words that name neither way out.
        if not self.use_cpu and self.bf16 is not False and not self.fp16 and not has_bf16_device():
            raise ValueError(
                "there is no GPU here that computes in bf16: set use_cpu: true to train on the CPU, or bf16: false "
                "for a GPU without bf16"
            )
        if self.use_cpu and self.fp16:
            raise ValueError("fp16 needs a GPU: with use_cpu: true set fp16: false (bf16 works on a CPU)")

    def check(self, whole: bool = True) -> None:
        """Raise ValueError for settings that contradict; the trainer checks again, since fields may be assigned.

        Args:
            whole: also look for settings that contradict the objective.
        """
        check_numbers(self)
        check_choices(self)
        self._warn_of_small_alpha()
        if self.distillation_mode == "sampled_token" and self.distillation_alpha != 1.0:
            raise ValueError(
                "distillation_mode: sampled_token estimates the reverse KL only; set distillation_alpha: 1.0"
            )
        for template, slot in (
            (self.reprompt_template, "{prompt}"),
            (self.solution_template, "{successful_previous_attempt}"),
            (self.feedback_template, "{feedback_raw}"),
        ):
            if slot not in template:
                raise ValueError(f"the template {template!r} lacks its slot {slot}")
        if any(not text for text in self.stop_strings):
            raise ValueError("stop_strings holds an empty text, which would end every turn at once")
        check_batch(self)
        check_replay(self)
        check_generation_kwargs(self)
        self.eval_on_start |= self.load_best_model_at_end  # `srpo.trainer.checkpoint.StartIsCandidate`
        if whole:
            self._check_objective()

    def _check_objective(self) -> None:
        record = objective_of(self)
        if record.branch is not None and self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the weights and the teacher belong to whole optimiser steps"
            )
        record.check(self)

    def _warn_of_small_alpha(self) -> None:
        alpha = self.distillation_alpha
        share, end = min((alpha, 0.0), (1.0 - alpha, 1.0))
        if objective_of(self).branch is not None and 0.0 < share < SMALL_ALPHA:
            logger.warning_once(
                f"distillation_alpha={alpha:g}: the divergence is about {share:.1g} times as large as at "
                f"distillation_alpha: {end:g}, where it is a whole KL (it is not continuous there), so that next to "
                f"nothing is distilled; set exactly {end:g}, or a value between {SMALL_ALPHA} and {1 - SMALL_ALPHA}"
            )


def as_srpo_config(args: Any) -> SRPOConfig:
    """TRL's own config as ours: its values as they are, and our defaults for the fields that it does not have.

    Raises:
        TypeError: the config of another trainer.
    """
    if isinstance(args, SRPOConfig):
        return args
    if not isinstance(args, GRPOConfig) or type(args).__module__.startswith("trl.experimental"):
        raise TypeError(f"args must be an SRPOConfig or trl's GRPOConfig; {type(args).__name__} is of another trainer")
    made = object.__new__(SRPOConfig)  # its checks have run, and TRL's refuse what they have filled in themselves
    made.__dict__.update(vars(args))
    for ours in fields(SRPOConfig):
        if ours.name not in vars(made):
            default = ours.default if ours.default_factory is MISSING else ours.default_factory()
            made.__dict__[ours.name] = default
    made.objective = "srpo"
    return made


def kept_defaults(args: SRPOConfig) -> list[str]:
    """`name=value` of the fields whose default we change on purpose, and that have another value here."""
    names = ("scale_rewards", "epsilon_high", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max")
    ours = {f.name: f.default for f in fields(SRPOConfig)}
    return [f"{name}={getattr(args, name)!r}" for name in names if getattr(args, name) != ours[name]]


def has_bf16_device() -> bool:
    """Whether transformers takes bf16 without `use_cpu`."""
    return bool(is_torch_bf16_gpu_available() or is_torch_xla_available())
