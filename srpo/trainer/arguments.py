"""What a trainer is given: checked before anything is built, and refused where two arguments contradict."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers.utils import logging
from trl import GRPOConfig

from srpo.columns import check_dataset_columns
from srpo.config import SRPOConfig, as_srpo_config, kept_defaults
from srpo.objectives import objective_of
from srpo.rollout.each_of import EachOf
from srpo.trainer.engines import gather_when_saving
from srpo.trainer.precision import check_precision

logger = logging.get_logger(__name__)


def checked_config(args: GRPOConfig | None, objective: str | None) -> SRPOConfig:
    """The configuration of a trainer: of ours or TRL's class, or the default one.

    Args:
        objective: what the trainer's class says; None: what the configuration says.
    """
    if args is None:
        args = SRPOConfig(output_dir=f"{objective or 'srpo'}-output", objective=objective or "srpo")
    if not isinstance(args, SRPOConfig):
        args = as_srpo_config(args)
        if objective is None and (kept := kept_defaults(args)):
            logger.warning(
                "args is TRL's own config: %s hold, as it says; SRPOConfig has the papers' defaults for %s",
                ", ".join(kept),
                args.objective,
            )
    if objective is not None:
        args.objective = objective
    args.check()
    check_precision(args)
    gather_when_saving(args)
    return args


def refuse_contradictions(
    args: SRPOConfig, given: Mapping[str, Any], world: Any, environment: Any, allowed: Any
) -> None:
    """ValueError for arguments of a trainer that exclude each other.

    Args:
        given: those of TRL's, by name.
        allowed: `allowed_tokens`.
    """
    for data in datasets_of(given):
        check_dataset_columns(getattr(data, "column_names", None) or (), environment is not None)
    if environment is not None:
        _refuse_other_rollouts(args, given, world)
    else:
        _refuse_settings_of_episodes(args, loses=world is not None or args.reward_deadline is not None)
    if args.world_deadline is not None and world is None:
        raise ValueError(
            f"world_deadline={args.world_deadline!r} is read with world= only, and none is given: leave it out"
        )
    if allowed is not None:
        _refuse_with_allowed_tokens(args, given, environment)
    if isinstance(allowed, EachOf):
        check_each_of(args, len(allowed.alternatives))


def _refuse_other_rollouts(args: Any, given: Mapping[str, Any], world: Any) -> None:
    """ValueError for arguments that an environment excludes."""
    others = {"world": world} | {name: given.get(name) for name in ("rollout_func", "tools", "environment_factory")}
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"environment= and {name}= both say what happens to a completion; give one of them")
    if args.use_transformers_continuous_batching:
        raise ValueError("use_transformers_continuous_batching has no meaning with environment=; leave it False")
    if args.generation_kwargs and not args.use_vllm:
        names = ", ".join(args.generation_kwargs)
        raise ValueError(f"generation_kwargs ({names}) are not read with environment=; set the fields of the config")


def _refuse_with_allowed_tokens(args: Any, given: Mapping[str, Any], environment: Any) -> None:
    """ValueError for arguments under which sampling could not be restricted to `allowed_tokens`."""
    if environment is not None:
        raise ValueError("allowed_tokens= is for completions of one turn; an environment's episodes have choices")
    if given.get("tools") or given.get("environment_factory"):
        raise ValueError("allowed_tokens= says nothing of the turns of tools=; give one of them")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            raise ValueError(f"allowed_tokens= restricts our own generator only; set {name}: false")


def check_each_of(args: SRPOConfig, alternatives: int) -> None:
    """ValueError for arguments that would read completions of `EachOf` as if the policy had drawn them, and for groups
    that are too small for it."""
    needed = {"objective": "grpo", "scale_rewards": "none", "beta": 0.0, "routing_replay": "off"}
    if objective_of(args).sampler_logps:
        needed["loss_type"] = "dapo"
    for name, value in needed.items():
        if (given := getattr(args, name)) != value:
            raise ValueError(
                f"groups that hold each alternative (exact_credit) are not draws of the policy, which {name}: {given} "
                f"needs; set {name}: {value}"
            )
    if args.num_generations < 2 * alternatives:
        raise ValueError(
            f"num_generations is {args.num_generations}, but a group holds each of {alternatives} alternatives after "
            f"two thoughts or more, to compare them (exact_credit); set num_generations: {2 * alternatives}, or more"
        )


_EPISODES_ONLY = (
    "max_turns", "max_turn_tokens", "max_observation_tokens", "stop_strings", "step_deadline", "episode_deadline",
    "max_cost_usd", "rollout_ahead",
)  # fmt: skip
"""Fields of the configuration that only the rollout of an environment reads."""
_LOSSES_ONLY = ("max_lost_share", "max_lost_batches")
"""Those that a world and `reward_deadline` read too, which also lose completions."""


def _refuse_settings_of_episodes(args: Any, loses: bool) -> None:
    """ValueError for fields that only episodes read, where there is no environment: they would do nothing."""
    defaults = {field.name: field for field in fields(args)}
    for name in (*_EPISODES_ONLY, *(() if loses else _LOSSES_ONLY)):
        field = defaults[name]
        neutral = field.default if field.default_factory is MISSING else field.default_factory()
        if (value := getattr(args, name)) != neutral:
            raise ValueError(
                f"{name}={value!r} is read by the episodes of an environment only, and none is given: leave it at "
                f"{neutral!r}, or pass environment="
            )


def datasets_of(arguments: Mapping[str, Any]) -> list[Any]:
    """The datasets among a trainer's arguments; `eval_dataset` may be several."""
    evaluation = arguments.get("eval_dataset")
    return [arguments.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]


def init_kwargs(args: SRPOConfig) -> dict[str, Any]:
    """How TRL loads a policy that is given by its path."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return options
