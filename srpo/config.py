"""Configuration of the trainer core: TRL's `GRPOConfig` plus what self-distillation and sample routing need.

The names are those of TRL's `GRPOConfig` and `SDPOConfig`; the defaults are the published settings of SRPO
(arXiv:2604.02288, Table 3) and SDPO (arXiv:2601.20802, Table 12), so any key you set is visibly your own choice.
Four defaults of TRL's differ here on purpose: `scale_rewards="none"` (both papers' baselines do not divide by the
standard deviation), `epsilon_high=0.28`, token-truncated importance weights of the sampler, at most 2, and
`disable_dropout=True` (srpo/trainer/train_mode.py).
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import GRPOConfig

from srpo.objectives.advantages import BASELINES, SCALES
from srpo.ranges import Ranges, check_numbers
from srpo.redact import redacted
from srpo.replay.settings import check_minirl, check_replay
from srpo.rollout.sampling_rules import check_generation_kwargs
from srpo.trainer.ranges import TRAINER_RANGES

logger = logging.get_logger(__name__)

OBJECTIVE_NAMES = ("grpo", "sdpo", "srpo", "bopo")
TEACHER_KINDS = ("ema", "trust_region", "frozen", "live")
DISTILLATION_MODES = ("topk_logits", "full_logits", "sampled_token")
DEMONSTRATIONS = ("first", "random", "best")
AGGREGATIONS = ("token", "sequence_mean")
SMALL_ALPHA = 0.01
"""Nearer than this to an end, but not at it, distillation_alpha leaves next to nothing of the divergence."""

# GRPO settings of TRL's that act inside its own loss function, which only `objective="grpo"` runs.
_GRPO_ONLY = {
    "loss_type": "dapo",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SRPOConfig(GRPOConfig):
    """Arguments of [`SRPOTrainer`]: every argument of TRL's `GRPOConfig`, and the ones below."""

    RANGES: ClassVar[Ranges] = TRAINER_RANGES

    disable_dropout: bool = field(
        default=True,
        metadata=_help(
            "Train without dropout, LoRA's, attention's and layer dropout and router jitter included, whatever the "
            "model's configuration says: student, teacher, old and reference policy are compared token by token."
        ),
    )
    scale_rewards: str = field(default="none", metadata=_help("As in TRL; the papers' baselines do not scale."))
    epsilon_high: float | None = field(default=0.28, metadata=_help("Upper clip range of the GRPO branch."))
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata=_help("As in TRL (eq. 2.3)."))
    vllm_importance_sampling_clip_max: float | None = field(default=2.0, metadata=_help("As in TRL (eq. 2.3)."))

    log_completions: bool = field(
        default=True, metadata=_help("As in TRL: OUTPUT/completions/*.parquet at every log, and a W&B table.")
    )
    num_completions_to_print: int | None = field(default=0, metadata=_help("As in TRL; 0: print none."))

    objective: str = field(
        default="",
        metadata=_help(
            "grpo: TRL's GRPO, any loss_type. sdpo: self-distillation. srpo: routed per sample. bopo: BoPO-style, "
            "reference-guided advantages for budget-aware routing. Left out: srpo, or what the trainer's class says."
        ),
    )

    # Self-teacher
    teacher_model_kind: str = field(
        default="ema",
        metadata=_help(
            "ema: fp32 moving average. trust_region: geometric mix of the first and the current weights. frozen: the "
            "first weights. live: the current weights (diverges in the SDPO paper, Table 4)."
        ),
    )
    teacher_update_rate: float = field(
        default=0.05, metadata=_help("tau: EMA rate per generation batch; share of the student in trust_region.")
    )

    # Divergence
    distillation_mode: str = field(
        default="topk_logits", metadata=_help("Support of the divergence: topk_logits, full_logits or sampled_token.")
    )
    distillation_alpha: float = field(
        default=0.5,
        metadata=_help(
            "0: KL(teacher||student), 1: KL(student||teacher), 0.5: Jensen-Shannon. Not continuous at the ends: the "
            "loss shrinks like alpha towards 0 and like 1 - alpha towards 1, and jumps to a whole KL at exactly 0 "
            "and 1; values below 0.01 and above 0.99 are warned of."
        ),
    )
    distillation_topk: int = field(default=100, metadata=_help("Support size of topk_logits."))
    distillation_add_tail: bool = field(
        default=True, metadata=_help("Keep the mass outside the top k as one bucket (else renormalise over the k).")
    )
    distillation_is_clip: float | None = field(
        default=2.0, metadata=_help("Cap on the detached ratio pi/pi_old of the distilled tokens; None: no ratio.")
    )
    distillation_aggregation: str = field(
        default="token",
        metadata=_help("token: one mean over tokens. sequence_mean: mean of per-sequence means, as lasgroup's code."),
    )
    entropy_weight_beta: float = field(
        default=1.0, metadata=_help("srpo: beta in w = exp(-beta * teacher entropy), of mean 1; 0: no weights.")
    )

    # Routing and teacher information
    success_reward_threshold: float = field(
        default=0.5, metadata=_help("A rollout is correct when its reward reaches this, or ask `correctness`.")
    )
    demonstration: str = field(
        default="first", metadata=_help("Which correct sibling is shown: first, random, or best (highest reward).")
    )
    remove_thinking_from_demonstration: bool = field(
        default=True, metadata=_help("Strip <think>...</think> from the demonstration.")
    )
    include_environment_feedback: bool = field(
        default=False, metadata=_help("Show the `feedback` column (or one logged by a reward) to the teacher.")
    )
    environment_feedback_only_without_solution: bool = field(
        default=True, metadata=_help("Use feedback only where no correct sibling exists.")
    )
    max_reprompt_len: int = field(
        default=10240, metadata=_help("Tokens of the teacher's prompt; only demonstration and feedback are cut.")
    )
    reprompt_template: str = field(
        default="{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        metadata=_help("The teacher's last user turn, as published."),
    )
    solution_template: str = field(
        default="\nCorrect solution:\n\n{successful_previous_attempt}", metadata=_help("As published.")
    )
    feedback_template: str = field(
        default="\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}",
        metadata=_help("As published."),
    )

    # Mixture-of-experts policies, and the loss type minirl (srpo/replay/settings.py)
    routing_replay: str = field(
        default="off",
        metadata=_help(
            "Train with experts that were chosen earlier. R2: by this engine when it scored the rollouts. R3: by the "
            "engine that sampled. auto: by the number of optimiser steps per rollout; off for a dense model."
        ),
    )
    routing_replay_metrics_steps: int = field(
        default=10, metadata=_help("Optimiser steps between two audits of native against replayed routing; 0: none.")
    )
    minirl_cap: float = field(
        default=5.0, metadata=_help("loss_type: minirl: largest importance weight pi_theta/mu_old.")
    )

    # Episodes of several turns (environment=); max_completion_length covers all of them
    max_turns: int = field(default=4, metadata=_help("Turns of the policy in one episode."))
    max_turn_tokens: int | None = field(default=None, metadata=_help("Tokens of one turn; None: no limit of its own."))
    max_observation_tokens: int = field(
        default=600, metadata=_help("Tokens of the body of one observation; longer ones are cut.")
    )
    stop_strings: list[str] = field(
        default_factory=list, metadata=_help("Texts of the policy that end its turn: the closing tags of its actions.")
    )
    step_deadline: float = field(
        default=60.0, metadata=_help("Seconds that the world may take for one step; longer loses the rollout.")
    )
    episode_deadline: float | None = field(
        default=None, metadata=_help("Seconds of the rollout after which an episode gets no further turn.")
    )
    max_lost_share: float = field(
        default=0.25, metadata=_help("Share of lost rollouts that a batch may have; see max_lost_batches.")
    )
    max_lost_batches: int = field(
        default=3, metadata=_help("Batches in a row with more than max_lost_share before the run stops.")
    )
    max_cost_usd: float | None = field(
        default=None, metadata=_help("Stop, with a checkpoint, after the step that reaches this cost over all ranks.")
    )

    # objective: bopo (srpo/objectives/advantages.py); the column `references` holds [R_S, R_L] of a row
    advantage_baseline: str = field(
        default="refmax", metadata=_help("What a reward is compared with: refmax, refgroup, refmean, refsmall, none.")
    )
    advantage_scale: str = field(
        default="group+ref", metadata=_help("What it is divided by: std with references (group+ref), group, or none.")
    )
    drop_all_fail: bool = field(default=False, metadata=_help("Groups without a correct rollout teach nothing."))
    distill_failed: bool = field(
        default=False, metadata=_help("bopo: failed rollouts with a correct sibling are distilled, as in srpo.")
    )

    # Alarms
    diagnostics_warning_interval: int = field(
        default=10, metadata=_help("Logged steps of one degenerate state (no teacher, ...) before one warning.")
    )

    def __post_init__(self) -> None:
        check_numbers(self)  # before TRL divides by them
        self._check_device()
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
        _choice("objective", self.objective, OBJECTIVE_NAMES)
        _choice("teacher_model_kind", self.teacher_model_kind, TEACHER_KINDS)
        _choice("distillation_mode", self.distillation_mode, DISTILLATION_MODES)
        _choice("demonstration", self.demonstration, DEMONSTRATIONS)
        _choice("distillation_aggregation", self.distillation_aggregation, AGGREGATIONS)
        _choice("advantage_baseline", self.advantage_baseline, BASELINES)
        _choice("advantage_scale", self.advantage_scale, SCALES)
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
        check_minirl(self)
        check_replay(self)
        check_generation_kwargs(self)
        if whole:
            self._check_objective()

    def _check_objective(self) -> None:
        if self.objective != "grpo" and self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the weights and the teacher belong to whole optimiser steps"
            )
        if self.objective == "sdpo" and self.beta != 0.0:
            raise ValueError(f"beta={self.beta}: sdpo has no penalty to a reference policy; set beta: 0.0")
        if self.objective != "grpo":
            for name, neutral in _GRPO_ONLY.items():
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} acts inside TRL's own loss and has no meaning for objective: "
                        f"{self.objective}; leave it at {neutral!r} or use objective: grpo"
                    )

    def _warn_of_small_alpha(self) -> None:
        alpha = self.distillation_alpha
        share, end = min((alpha, 0.0), (1.0 - alpha, 1.0))
        if self.objective != "grpo" and 0.0 < share < SMALL_ALPHA:
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


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
