"""Credit in place of TRL's group advantages, where the objective has its own."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives import Objective
from srpo.objectives.advantages import importance_weighted, references_of
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.metrics import as_the_policy_drew


def credited(
    objective: Objective, step: GenerationStep, success: Tensor, args: Any, accelerator: Accelerator, logged: Any
) -> Tensor:
    """Advantages [B] of this rank's completions.

    Args:
        success: [B] bool, of this rank.
        logged: TRL's records of all ranks, (metrics by name, columns of the table): what they hold of this batch's
            advantages and rewards is replaced by what these are.
    """
    metrics, table = logged
    rewards = accelerator.gather(step.rewards)  # a group may straddle ranks
    if step.importance is not None:
        importance = accelerator.gather(step.importance)
        advantages = importance_weighted(rewards, importance, args.num_generations)
        as_the_policy_drew(metrics, table, rewards, importance)
    else:
        assert objective.credit is not None
        references = None
        if (found := references_of(step.references, args)) is not None:
            references = accelerator.gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
        advantages = objective.credit(rewards, references, accelerator.gather(success), args)
    everyone = advantages.tolist()
    for _ in everyone:
        table["advantages"].pop()
    table["advantages"].extend(everyone)
    metrics[f"{args.objective}/below_baseline"].append(sum(a < 0 for a in everyone) / len(everyone))
    start = accelerator.process_index * len(step.rewards)
    return advantages[start : start + len(step.rewards)]
