"""`loss_type: minirl` for the objective grpo: `srpo.objectives.minirl` on TRL's batches."""

from typing import Any

import torch
from torch import Tensor

from srpo.objectives import minirl


class MiniRLMixin:
    """The loss, for `srpo.trainer.trainer.SRPOTrainer`; every other loss type stays TRL's.

    mu_old is the batch's `sampling_per_token_logps`: vLLM's, or those of the sampling pass
    (`srpo.rollout.sampler_logprobs`). A rollout function that returns no log-probs leaves pi_old in its place: the
    weight is then pi_theta/pi_old.
    """

    accelerator: Any
    args: Any
    aux_loss_enabled: bool
    current_gradient_accumulation_steps: int
    epsilon_high: float
    epsilon_low: float
    loss_type: str
    max_completion_length: int
    model: Any
    router_aux_loss_coef: float
    _get_per_token_logps_and_entropies: Any
    _metrics: Any

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.loss_type != "minirl":
            return super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        logp, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model, ids, attention, mask.size(1), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        old_logp = inputs.get("old_per_token_logps")
        old_logp = logp.detach() if old_logp is None else old_logp
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        output = minirl.loss(
            logp,
            old_logp,
            inputs.get("sampling_per_token_logps", old_logp),
            inputs["advantages"],
            mask,
            normaliser=float(mask.size(0) * self.max_completion_length * steps),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            cap=self.args.minirl_cap,
        )
        self._log_minirl(output.metrics, (entropy * mask).sum().detach())
        if not self.aux_loss_enabled:
            return output.loss
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return output.loss + self.router_aux_loss_coef * aux_loss / steps

    def _log_minirl(self, tokens: dict[str, Tensor], nats: Tensor) -> None:
        sums = torch.stack([*tokens.values(), nats]).to(nats.dtype)
        trained, low, high, truncated, entropy = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        shares = {  # the first three are TRL's names
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,
            "minirl/truncated": truncated,
            "entropy": entropy,
        }
        for name, value in shares.items():
            metrics[name].append(value / max(trained, 1.0))
