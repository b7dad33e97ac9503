"""Credit in place of TRL's group advantages, where the objective has its own."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives import Objective
from srpo.objectives.advantages import references_of
from srpo.trainer.generation_step import GenerationStep


def credited(
    objective: Objective, step: GenerationStep, success: Tensor, args: Any, accelerator: Accelerator, logged: Any
) -> tuple[Tensor, float]:
    """Advantages [B] of this rank's completions, and the share of all ranks' that are below 0.

    Args:
        success: [B] bool, of this rank.
        logged: TRL's records of all ranks' advantages; those of this batch take the last ones' place.
    """
    assert objective.credit is not None
    rewards, found = step.rewards, references_of(step.references, args)
    references = None
    if found is not None:
        references = accelerator.gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
    # A group may straddle ranks.
    advantages = objective.credit(accelerator.gather(rewards), references, accelerator.gather(success), args)
    everyone = advantages.tolist()
    for _ in everyone:
        logged.pop()
    logged.extend(everyone)
    start = accelerator.process_index * len(rewards)
    return advantages[start : start + len(rewards)], sum(a < 0 for a in everyone) / len(everyone)
