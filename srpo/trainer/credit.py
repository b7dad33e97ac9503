"""Credit in place of TRL's group advantages, where the objective has its own."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives import Objective
from srpo.objectives.advantages import references_of
from srpo.trainer.generation_step import GenerationStep


def credited(
    objective: Objective, step: GenerationStep, correct: Tensor, group: int, args: Any, accelerator: Accelerator
) -> Tensor:
    """Advantages of all ranks' completions, since a group may straddle ranks: [B x ranks].

    Args:
        correct: [B] bool, of this rank.
        group: rollouts of one prompt.
    """
    assert objective.credit is not None
    rewards, found = step.rewards, references_of(step.references, args)
    references = None
    if found is not None:
        references = accelerator.gather(torch.tensor(found, dtype=torch.float32, device=rewards.device))
    return objective.credit(accelerator.gather(rewards), references, accelerator.gather(correct), group, args)
