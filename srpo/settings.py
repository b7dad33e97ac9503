"""The keys of a recipe that are ours: what self-distillation, branches, episodes and replay need beside TRL's.

No torch in here: `srpo train --help` answers at once. `srpo.SRPOConfig` inherits these fields together with TRL's
`GRPOConfig`, and they win where both have one.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from srpo.objectives.names import BASELINES, OBJECTIVE_NAMES, SCALES
from srpo.ranges import FINITE, Ranges, above, at_least, between
from srpo.replay.settings import REPLAY_MODES

TEACHER_KINDS = ("ema", "trust_region", "frozen", "live")
DISTILLATION_MODES = ("topk_logits", "full_logits", "sampled_token")
DEMONSTRATIONS = ("first", "random", "best")
SHARED_PREFIX = ("auto", "on", "off")
AGGREGATIONS = ("token", "sequence_mean")
ALARMS = ("entropy", "length", "kl", "flat", "format", "one_member", "no_calls", "no_teacher", "heldout")


def about(text: str, *, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Metadata of a recipe key: what it does, and the words that it may be."""
    return {"help": text} | ({"choices": choices} if choices else {})


def check_choices(settings: Any) -> None:
    """ValueError for a field of a dataclass that is none of the `choices` of its metadata."""
    for one in fields(settings):
        choices, value = one.metadata.get("choices"), getattr(settings, one.name)
        for word in value if isinstance(value, list) else [value]:
            if choices and word not in choices and word != one.default:
                raise ValueError(f"{one.name}={word!r} is not one of {', '.join(choices)}")


@dataclass
class Settings:
    """What `SRPOConfig` has beside, or otherwise than, TRL's `GRPOConfig`."""

    RANGES: ClassVar[Ranges] = {
        "prompts_per_step": at_least(1),
        "gradient_accumulation_steps": at_least(1),
        "teacher_update_rate": between(0, 1),
        "distillation_alpha": between(0, 1),
        "distillation_topk": at_least(1),
        "distillation_is_clip": above(0),
        "entropy_weight_beta": at_least(0),
        "success_reward_threshold": FINITE,
        "max_reprompt_len": at_least(1),
        "routing_replay_metrics_steps": at_least(0),
        "minirl_cap": above(0),
        "max_turns": at_least(1),
        "max_turn_tokens": at_least(1),
        "max_observation_tokens": at_least(0),
        "step_deadline": above(0),
        "episode_deadline": above(0),
        "rollout_ahead": between(0, 1),
        "max_lost_share": between(0, 1),
        "max_lost_batches": at_least(1),
        "max_cost_usd": at_least(0),
        "signal_deadline": above(0),
        "reward_deadline": above(0),
        "world_deadline": above(0),
        "hang_deadline": above(0),
        "hub_deadline": above(0),
        "max_bad_steps": at_least(1),
        "diagnostics_warning_interval": at_least(1),
    }

    prompts_per_step: int | None = field(
        default=None,
        metadata=about(
            "Prompts of an optimiser step over all processes, num_generations completions each. With it, "
            "gradient_accumulation_steps and steps_per_generation follow from the number of processes and from "
            "per_device_train_batch_size, which is then a matter of memory alone."
        ),
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata=about("As in transformers (1); leave it out beside prompts_per_step.")
    )

    disable_dropout: bool = field(
        default=True,
        metadata=about(
            "Train without dropout, LoRA's, attention's and layer dropout and router jitter included, whatever the "
            "model's configuration says: student, teacher, old and reference policy are compared token by token."
        ),
    )
    scale_rewards: str = field(default="none", metadata=about("As in TRL; the papers' baselines do not scale."))
    epsilon_high: float | None = field(default=0.28, metadata=about("Upper clip range of the GRPO branch."))
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata=about("As in TRL (eq. 2.3)."))
    vllm_importance_sampling_clip_max: float | None = field(default=2.0, metadata=about("As in TRL (eq. 2.3)."))

    log_completions: bool = field(
        default=True, metadata=about("As in TRL: OUTPUT/completions/*.parquet at every log, and a W&B table.")
    )
    num_completions_to_print: int | None = field(default=0, metadata=about("As in TRL; 0: print none."))

    objective: str = field(
        default="",
        metadata=about(
            "grpo: TRL's GRPO, any loss_type. sdpo: self-distillation. srpo: routed per sample. bopo: BoPO-style, "
            "reference-guided advantages for budget-aware routing. Left out: srpo, or what the trainer's class says.",
            choices=tuple(OBJECTIVE_NAMES),
        ),
    )

    # Self-teacher
    teacher_model_kind: str = field(
        default="ema",
        metadata=about(
            "ema: fp32 moving average. trust_region: geometric mix of the first and the current weights. frozen: the "
            "first weights. live: the current weights (diverges in the SDPO paper, Table 4).",
            choices=TEACHER_KINDS,
        ),
    )
    teacher_update_rate: float = field(
        default=0.05, metadata=about("tau: EMA rate per generation batch; share of the student in trust_region.")
    )

    # Divergence
    distillation_mode: str = field(
        default="topk_logits",
        metadata=about(
            "Support of the divergence: topk_logits, full_logits or sampled_token.", choices=DISTILLATION_MODES
        ),
    )
    distillation_alpha: float = field(
        default=0.5,
        metadata=about(
            "0: KL(teacher||student), 1: KL(student||teacher), 0.5: Jensen-Shannon. Not continuous at the ends: the "
            "loss shrinks like alpha towards 0 and like 1 - alpha towards 1, and jumps to a whole KL at exactly 0 "
            "and 1; values below 0.01 and above 0.99 are warned of."
        ),
    )
    distillation_topk: int = field(default=100, metadata=about("Support size of topk_logits."))
    distillation_add_tail: bool = field(
        default=True, metadata=about("Keep the mass outside the top k as one bucket (else renormalise over the k).")
    )
    distillation_is_clip: float | None = field(
        default=2.0, metadata=about("Cap on the detached ratio pi/pi_old of the distilled tokens; None: no ratio.")
    )
    distillation_aggregation: str = field(
        default="token",
        metadata=about(
            "token: one mean over tokens. sequence_mean: mean of per-sequence means, as lasgroup's code.",
            choices=AGGREGATIONS,
        ),
    )
    entropy_weight_beta: float = field(
        default=1.0, metadata=about("srpo: beta in w = exp(-beta * teacher entropy), of mean 1; 0: no weights.")
    )

    # Routing and teacher information
    success_reward_threshold: float = field(
        default=0.5, metadata=about("A rollout is correct when its reward reaches this, or ask `correctness`.")
    )
    demonstration: str = field(
        default="first",
        metadata=about(
            "Which correct sibling is shown: first, random, or best (highest reward).", choices=DEMONSTRATIONS
        ),
    )
    remove_thinking_from_demonstration: bool = field(
        default=True, metadata=about("Strip <think>...</think> from the demonstration.")
    )
    include_environment_feedback: bool = field(
        default=False, metadata=about("Show the `feedback` column (or one logged by a reward) to the teacher.")
    )
    environment_feedback_only_without_solution: bool = field(
        default=True, metadata=about("Use feedback only where no correct sibling exists.")
    )
    max_reprompt_len: int = field(
        default=10240, metadata=about("Tokens of the teacher's prompt; only demonstration and feedback are cut.")
    )
    reprompt_template: str = field(
        default="{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        metadata=about("The teacher's last user turn, as published."),
    )
    solution_template: str = field(
        default="\nCorrect solution:\n\n{successful_previous_attempt}", metadata=about("As published.")
    )
    feedback_template: str = field(
        default="\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}",
        metadata=about("As published."),
    )

    shared_prefix: str = field(
        default="auto",
        metadata=about(
            "Encode what the rows of a micro-batch begin with alike (system part, prompt of a group, turns) once, in "
            "every pass that scores. auto: where the estimated cost is lower. on: wherever the model takes it. off: "
            "never; passes are then TRL's own, bit for bit.",
            choices=SHARED_PREFIX,
        ),
    )

    # Mixture-of-experts policies, and the loss type minirl (srpo/replay/settings.py)
    routing_replay: str = field(
        default="off",
        metadata=about(
            "Train with experts that were chosen earlier. R2: by this engine when it scored the rollouts. R3: by the "
            "engine that sampled. auto: by the number of optimiser steps per rollout; off for a dense model.",
            choices=REPLAY_MODES,
        ),
    )
    routing_replay_metrics_steps: int = field(
        default=10, metadata=about("Optimiser steps between two audits of native against replayed routing; 0: none.")
    )
    minirl_cap: float = field(
        default=5.0, metadata=about("loss_type: minirl: largest importance weight pi_theta/mu_old.")
    )

    # Episodes of several turns (environment=); max_completion_length covers all of them
    max_turns: int = field(default=4, metadata=about("Turns of the policy in one episode."))
    max_turn_tokens: int | None = field(default=None, metadata=about("Tokens of one turn; None: no limit of its own."))
    max_observation_tokens: int = field(
        default=600, metadata=about("Tokens of the body of one observation; longer ones are cut.")
    )
    stop_strings: list[str] = field(
        default_factory=list, metadata=about("Texts of the policy that end its turn: the closing tags of its actions.")
    )
    step_deadline: float = field(
        default=60.0, metadata=about("Seconds that the world may take for one step; longer loses the rollout.")
    )
    episode_deadline: float | None = field(
        default=None, metadata=about("Seconds of the rollout after which an episode gets no further turn.")
    )
    rollout_ahead: int = field(
        default=0,
        metadata=about(
            "1: play the next generation batch while this one trains, by a copy of the policy, one step off-policy; "
            "old log-probs are then the sampler's. 0: sample with the newest weights."
        ),
    )
    max_lost_share: float = field(
        default=0.25, metadata=about("Share of lost completions that a batch may have; see max_lost_batches.")
    )
    max_lost_batches: int = field(
        default=3, metadata=about("Batches in a row with more than max_lost_share before the run stops.")
    )
    max_cost_usd: float | None = field(
        default=None, metadata=about("Stop, with a checkpoint, after the step that reaches this cost over all ranks.")
    )

    # objective: bopo (srpo/objectives/advantages.py); the column `references` holds [R_S, R_L] of a row
    advantage_baseline: str = field(
        default="refmax",
        metadata=about(
            "What a reward is compared with: refmax, refgroup, refmean, refsmall, none.", choices=BASELINES
        ),
    )
    advantage_scale: str = field(
        default="group+ref",
        metadata=about("What it is divided by: std with references (group+ref), group, or none.", choices=SCALES),
    )
    drop_all_fail: bool = field(default=False, metadata=about("Groups without a correct rollout teach nothing."))
    distill_failed: bool = field(
        default=False, metadata=about("bopo: failed rollouts with a correct sibling are distilled, as in srpo.")
    )

    # Going on, and ending
    metric_for_best_model: str | None = field(
        default="eval_reward",
        metadata=about(
            "As in TRL; a run with an eval_strategy evaluates, in training, on a fifth of its training items, which "
            "are not trained on (step_routing: on validation_tasks, where there are some). The best one's checkpoint "
            "is kept beyond save_total_limit: with evaluations and checkpoints at the same steps, or save_strategy: "
            "best. With load_best_model_at_end the policy that training starts from is a candidate, as step 0."
        ),
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata=about(
            "A checkpoint's folder; or auto: the newest whole one in output_dir, and from the start where there is "
            "none (true: an error there)."
        ),
    )
    signal_deadline: float = field(
        default=120.0,
        metadata=about(
            "Seconds that SIGTERM, SIGUSR1 or the first SIGINT leave to the step and its checkpoint before the "
            "process ends without."
        ),
    )
    reward_deadline: float | None = field(
        default=None,
        metadata=about(
            "Seconds that a reward function may take for one completion. Each then runs in a process of its own, "
            "which is killed when it is late, and is asked for one completion at a time; what it does not answer is "
            "lost, and counts for max_lost_share. None: in the trainer's process, all completions in one call."
        ),
    )
    world_deadline: float | None = field(
        default=None, metadata=about("The same for a world of one turn (world=); an episode's has step_deadline.")
    )
    hang_deadline: float = field(
        default=1800.0,
        metadata=about(
            "Seconds that one part of a step (rollout, world, reward, scoring, loss, gradient, save, evaluation) may "
            "take without moving on, in any process, before the run ends and says where each process stands. Outside "
            "of training a process waits for others for ddp_timeout."
        ),
    )
    hub_deadline: float = field(
        default=300.0,
        metadata=about(
            "push_to_hub: seconds, and one more for each MB, in which a push is tried again; the run goes on without."
        ),
    )
    max_bad_steps: int = field(
        default=3, metadata=about("Steps in a row that are skipped for NaN or inf before the run stops.")
    )

    # Alarms
    diagnostics_warning_interval: int = field(
        default=10, metadata=about("Logged steps of one degenerate state (no teacher, ...) before one warning.")
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata=about(
            "Warnings that end the run, with a checkpoint: of the policy's entropy, completions' length, KL, all "
            "rewards alike, no valid action, one member taking all, no calls, no teacher, a lower held-out reward.",
            choices=ALARMS,
        ),
    )
