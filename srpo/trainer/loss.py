"""The loss of an objective on one micro-batch: one forward of the student, the pure function, and what is logged."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives import Counts, LossConfig, Objective, TokenBatch, sampled_token_divergence
from srpo.objectives.batch import per_step
from srpo.trainer.distiller import Distiller


def sequences(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask [B, P + T] of prompt and completion, and T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention, batch["completion_ids"].size(1)


def constants(args: Any) -> LossConfig:
    """Those of the per-token losses, as a configuration says them."""
    return LossConfig(
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        level=args.importance_sampling_level,
        beta=args.beta,
        correct_kl=args.use_bias_correction_kl,
        is_clip=args.distillation_is_clip,
        aggregation=args.distillation_aggregation,
        cap=args.minirl_cap,
        length=args.max_completion_length,
    )


class Loss:
    """Called with (model, inputs, whether it trains, micro-batches of an optimiser step).

    What is logged is summed over the micro-batches of a step, and then over ranks, once: however the step was cut, a
    mean over tokens is that over all its tokens.

    Args:
        objective: one with a loss of its own.
        args: the configuration.
        distiller: what distilled tokens are compared with; None where nothing is distilled.
        router_loss: coefficient of the load-balancing loss of a mixture of experts; None: there is none.
    """

    def __init__(
        self,
        objective: Objective,
        accelerator: Accelerator,
        args: Any,
        distiller: Distiller | None,
        router_loss: float | None,
    ) -> None:
        self.objective, self.constants, self.args = objective, constants(args), args
        self.accelerator, self.distiller, self.router_loss = accelerator, distiller, router_loss
        self._gradients = torch.zeros(2, device=accelerator.device)  # squared norms: distilled, rewarded
        self._sums: dict[str, Tensor] = {}  # of the micro-batches since `metrics`, of this rank
        self._shares: dict[str, Tensor] = {}  # the same, of trained tokens

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any], training: bool, accumulation: int) -> Tensor:
        """The loss, with gradient."""
        assert self.objective.loss is not None
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        logp, entropy, divergence, router_loss = self.forward(model, inputs, mask)
        old_logp = inputs.get("old_per_token_logps")
        batch = TokenBatch(
            logp=logp,
            old_logp=logp.detach() if old_logp is None else old_logp,
            mask=mask,
            advantages=inputs["advantages"],
            distilled=inputs["distilled"],
            divergence=divergence,
            weights=inputs["distillation_weights"],
            counts=self._counts(inputs, mask.size(0), training, accumulation),
            sampler_ratio=inputs.get("importance_sampling_ratio"),
            ref_logp=inputs.get("ref_per_token_logps"),
            sampler_logp=inputs.get("sampling_per_token_logps"),
        )
        output = self.objective.loss(batch, self.constants)
        _add(self._sums, output.metrics)
        _add(self._shares, {"tokens": mask.sum(), "entropy": (entropy * mask).sum(), **output.tokens})
        if self.router_loss is None:
            return output.loss
        assert router_loss is not None
        _add(self._sums, {"aux_loss": router_loss / accumulation})
        return output.loss + self.router_loss * router_loss / accumulation

    def _counts(self, inputs: dict[str, Any], rows: int, training: bool, accumulation: int) -> Counts:
        """Denominators of one optimiser step; a generation batch may feed several (`per_step`)."""
        ranks, batches = self.accelerator.num_processes, self.args.steps_per_generation if training else 1
        share = partial(per_step, ranks=ranks, accumulation=accumulation, steps_per_generation=batches)
        completions = torch.tensor(float(rows * batches * ranks), device=inputs["distilled"].device)
        return Counts(share(inputs["num_items_in_batch"]), share(inputs["distilled_tokens"]), share(completions))

    def forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One forward of the student: log-probs, entropies, divergences [B, T], and the load-balancing loss."""
        ids, attention, length = sequences(inputs)
        labels = torch.full_like(ids, -100)
        labels[:, -length:] = inputs["completion_ids"].masked_fill(mask == 0, -100)
        distilled = inputs["distilled"]
        omega = mask.bool() & distilled.unsqueeze(1)
        extra: dict[str, Any] = {} if self.router_loss is None else {"output_router_logits": True}
        if self.distiller is not None:
            extra["targets"] = self.distiller.student_targets(inputs, omega)
            taught = distilled.unsqueeze(1).expand_as(mask)[mask.bool()]

            def probe(gradient: Tensor) -> None:
                squares = gradient.float().square().sum(dim=1)
                self._gradients += torch.stack([squares[taught].sum(), squares[~taught].sum()])

            extra["gradient_probe"] = probe
        with self.accelerator.autocast():
            output = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, **extra)
        logp, entropy = output.log_probs[:, -length:], output.entropy[:, -length:]
        divergence = getattr(output, "divergence", None)
        if "teacher_logps" in inputs and omega.any():
            divergence = sampled_token_divergence(logp, inputs["teacher_logps"]) * omega
        return logp, entropy, divergence, output.aux_loss

    def metrics(self) -> dict[str, float]:
        """Over all ranks and what was called since the last time; nothing where nothing was."""
        if not self._shares:
            return {}
        mine = torch.stack([value.float() for value in (*self._sums.values(), *self._shares.values())])
        found = self.accelerator.reduce(mine, reduction="sum")
        tokens = found[len(self._sums)].clamp(min=1)
        found = torch.cat(
            [found[: len(self._sums)] / self.accelerator.num_processes, found[len(self._sums) :] / tokens]
        )
        metrics = dict(zip((*self._sums, *self._shares), found.tolist(), strict=True))
        del metrics["tokens"]
        self._sums.clear()
        self._shares.clear()
        return metrics

    def gradient_share(self) -> dict[str, float]:
        """Share of the distilled branch in the gradient at the last hidden states of one optimiser step."""
        norms = self.accelerator.reduce(self._gradients, reduction="sum").sqrt()
        share = {"srpo/gradient_share": (norms[0] / norms.sum()).item()} if norms.sum() > 0 else {}
        self._gradients.zero_()
        return share


def loss_of(trainer: Any) -> Loss:
    """Of a trainer whose objective TRL's own loss is not; ValueError for a vision-language policy."""
    if trainer._is_vlm:
        raise ValueError(
            f"objective: {trainer.objective} trains text models only; use objective: grpo and a loss_type of TRL's"
        )
    router_loss = trainer.router_aux_loss_coef if trainer.aux_loss_enabled else None
    return Loss(trainer._record, trainer.accelerator, trainer.args, trainer.distiller, router_loss)


def _add(totals: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0) + value.detach()
