"""Credit of `objective: bopo` in the trainer: TRL's group advantages are replaced by reference-guided ones."""

from typing import Any

import torch
from torch import Tensor

from srpo.objectives.advantages import REFERENCES, group_advantages


class CreditMixin:
    """For `srpo.trainer.trainer.SRPOTrainer`; with any other objective everything is as it was."""

    _references: list[Any]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        self._references = [row.get(REFERENCES) for row in inputs]
        return super()._calculate_rewards(inputs, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.objective == "bopo" and self.model.training:
            everyone = self._reference_guided()  # a group may straddle ranks
            start = self.accelerator.process_index * len(inputs)
            batch["advantages"] = everyone[start : start + len(inputs)]
            logged = self._logs["advantages"]
            for _ in range(len(everyone)):
                logged.pop()
            logged.extend(everyone.tolist())
            # Nothing is distilled, unless the trainer routes rows to a teacher afterwards.
            mask = batch["completion_mask"]
            batch["routed"] = torch.zeros(len(inputs), dtype=torch.bool, device=mask.device)
            batch["distillation_weights"] = torch.zeros(mask.shape, device=mask.device)
            batch["distilled_tokens"] = torch.zeros((), device=mask.device)
        return batch

    def _reference_guided(self) -> Tensor:
        """[B of all ranks] advantages."""
        args, gather = self.args, self.accelerator.gather
        rewards = self._local_rewards
        if any(found is None or len(found) != 2 for found in self._references):
            if args.advantage_baseline != "none" or args.advantage_scale == "group+ref":
                row = next(i for i, found in enumerate(self._references) if found is None or len(found) != 2)
                raise ValueError(
                    f"row {row} of the batch: column {REFERENCES!r} is {self._references[row]!r}; advantage_baseline: "
                    f"{args.advantage_baseline} with advantage_scale: {args.advantage_scale} needs [R_S, R_L] there"
                )
            references = None
        else:
            references = gather(torch.tensor(self._references, dtype=torch.float32, device=rewards.device))
        advantages = group_advantages(
            gather(rewards),
            self.num_generations,
            baseline=args.advantage_baseline,
            scale=args.advantage_scale,
            references=references,
            success=gather(self._succeeded()),
            drop_all_fail=args.drop_all_fail,
        )
        below = (advantages < 0).float().mean().item()
        self._metrics["train"]["bopo/below_baseline"].append(below)
        return advantages
