"""The encoder policy as `srpo train` runs it: `model_name_or_path: encoder`, or `encoder_minilm`."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from routers.evaluation.episodes import Outcomes
from routers.evaluation.off_policy import Logged
from routers.router import find_router, load_router
from routers.tasks.query_routing.encoder.router import KIND, EncoderRouter
from routers.tasks.query_routing.encoder.training import train_encoder

NAMES = ("encoder", "encoder_minilm")
_TRAINING = (
    "num_generations max_steps learning_rate weight_decay entropy_coef scale_rewards advantage_baseline "
    "advantage_scale drop_all_fail distill_failed success_reward_threshold teacher_update_rate distillation_alpha "
    "entropy_weight_beta"
).split()
_DATA = "table catalogue drop_incomplete cost_weight cost_weights abstain_reward".split()
_BATCH = "objective exact_credit per_device_train_batch_size gradient_accumulation_steps".split()
_LOSS = "epsilon epsilon_high delta distillation_is_clip".split()


class Encoder:
    """`srpo.own_policy.OwnPolicy` of `QueryRouting`."""

    keys: Collection[str] = frozenset([*_DATA, *_BATCH, *_TRAINING, *_LOSS])

    def __init__(self, task: Any, name: str) -> None:
        self.task, self.name = task, name

    def train(self, given: dict[str, Any]) -> tuple[EncoderRouter, EncoderRouter]:
        """The policy before and after RL."""
        from srpo.trainer.loss import constants

        task, args = self.task, self.task.config
        if self.name not in NAMES:
            raise ValueError(f"{self.name} is a trained encoder: set model_name_or_path to one of {', '.join(NAMES)}")
        exact, rule = task.arguments.exact_credit, task.rule(None)
        if exact and args.objective != "grpo":
            raise ValueError(f"exact_credit is the limit of objective: grpo, and the objective is {args.objective}")
        how = {name: given[name] for name in _TRAINING if name in given}
        if "per_device_train_batch_size" in given:
            completions = args.per_device_train_batch_size * args.gradient_accumulation_steps
            how["queries"] = max(1, completions // args.num_generations)
        router = train_encoder(
            (Logged if task.table.log else Outcomes).of_table(task.table, rule, "train", task.chosen),
            rule,
            catalogue=task.table.catalogue,
            cost_weights=task.arguments.cost_weights,
            seed=args.seed,
            minilm=self.name == "encoder_minilm",
            abstain_reward=task.arguments.abstain_reward,
            settings=task.settings,
            objective="expected" if exact else args.objective,
            loss=constants(args),
            **how,
        )
        start = copy.deepcopy(router)
        start.model.forget()
        return start, router

    def load(self) -> EncoderRouter:
        """The router that lies at the name."""
        found: EncoderRouter = load_router(self.name)
        return found

    def save(self, policy: EncoderRouter, folder: Path) -> None:
        """Weights and `router.yaml`."""
        policy.made_from = self.task.made_from()[0]
        policy.save(folder)


def encoder_policy(task: Any, name: str) -> Encoder | None:
    """None: the name is not of an encoder policy."""
    try:
        found = name in NAMES or ((file := find_router(name)) is not None and file.kind == KIND)
    except ValueError:  # whoever loads it says so
        return None
    return Encoder(task, name) if found else None
