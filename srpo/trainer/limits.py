"""What excludes an environment, what stops a run, and a warning of TRL's that lost rollouts would repeat."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from logging import getLogger
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from srpo.trainer.rollouts import Rollouts
from srpo.types import Stopped

logger = logging.get_logger(__name__)


class LostRollouts(Stopped):
    """Too many rollouts were lost; a checkpoint has been saved."""


@contextmanager
def without_trl_warning() -> Iterator[None]:
    """TRL prints a whole row that no function has scored; lost rollouts are meant to have no score."""

    def quiet(record: Any) -> bool:
        return not str(record.msg).startswith("[RANK") or "All reward functions returned None" not in str(record.msg)

    trl = getLogger("trl.trainer.grpo_trainer")
    trl.addFilter(quiet)
    try:
        yield
    finally:
        trl.removeFilter(quiet)


def refuse_other_rollouts(args: Any, given: Mapping[str, Any], world: Any) -> None:
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


_EPISODES_ONLY = (
    "max_turns", "max_turn_tokens", "max_observation_tokens", "stop_strings", "step_deadline", "episode_deadline",
    "max_lost_share", "max_lost_batches", "max_cost_usd",
)  # fmt: skip
"""Fields of the configuration that only the rollout of an environment reads."""


def refuse_settings_of_episodes(args: Any) -> None:
    """ValueError for fields that only episodes read, where there is no environment: they would do nothing."""
    defaults = {field.name: field for field in fields(args)}
    for name in _EPISODES_ONLY:
        field = defaults[name]
        neutral = field.default if field.default_factory is MISSING else field.default_factory()
        if (value := getattr(args, name)) != neutral:
            raise ValueError(
                f"{name}={value!r} is read by the episodes of an environment only, and none is given: leave it at "
                f"{neutral!r}, or pass environment="
            )


class RunLimits(TrainerCallback):
    """Stops a run that has spent its money or loses its rollouts, with a checkpoint; ends the episodes' thread."""

    def __init__(self, rollouts: Rollouts):
        self.rollouts = rollouts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reason = self.rollouts.losses.verdict or self.rollouts.stop_because
        if reason is not None and not control.should_training_stop:
            logger.warning("The run stops, with a checkpoint: %s", reason)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollouts.close()
        if self.rollouts.losses.verdict is not None:
            raise LostRollouts(f"{self.rollouts.losses.verdict}. A checkpoint was saved in {args.output_dir}")
