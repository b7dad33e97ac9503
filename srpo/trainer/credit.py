"""Credit in place of TRL's group advantages, where the objective has its own."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives import Objective
from srpo.objectives.advantages import references_of
from srpo.trainer.generation_step import GenerationStep


def credited(
    objective: Objective, step: GenerationStep, success: Tensor, args: Any, accelerator: Accelerator
) -> tuple[Tensor, list[float]]:
    """Advantages [B] of this rank's completions and, for the records, those of all ranks: a group may straddle ranks.

    Args:
        success: [B] bool, of this rank.
    """
    assert objective.credit is not None
    rewards, found = step.rewards, references_of(step.references, args)
    references = None
    if found is not None:
        references = accelerator.gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
    everyone = objective.credit(accelerator.gather(rewards), references, accelerator.gather(success), args)
    start = accelerator.process_index * len(rewards)
    return everyone[start : start + len(rewards)], everyone.tolist()
