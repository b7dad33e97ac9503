"""The teacher's pass of a generation batch: the routed rows are scored once, before the first update on them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from srpo.objectives import Head, entropy_weights
from srpo.objectives.divergence import CHUNK_TOKENS
from srpo.teacher.lm_head import Divergence, TeacherTargets, hidden_entropy, hidden_logp
from srpo.teacher.prompt import Templates, teacher_prompt_ids


@dataclass(frozen=True)
class Plan:
    """Who is distilled from what: one entry per completion of this rank."""

    routed: Tensor  # [B] bool
    demonstrations: list[str | None]
    feedback: list[str | None]


class DistillationMixin:
    """What distilled tokens are pulled towards, and how much each weighs, for `srpo.trainer.trainer.SRPOTrainer`."""

    accelerator: Any
    args: Any
    objective: str
    teacher: Any
    temperature: float
    _divergence: Divergence
    _metrics: Any
    _prompts: list[Any]
    _sum_over_ranks: Any
    _teacher_head: Head | None
    _templates: Templates
    _tokenize_prompts: Any
    _tokenizer: Any

    def _distillation_targets(self, batch: dict[str, Any], mask: Tensor, plan: Plan) -> dict[str, Any]:
        """Score the routed rows with the teacher. Everything per row has length B, so TRL can shuffle and split it."""
        rows = plan.routed.nonzero().flatten().tolist()
        omega = mask.bool() & plan.routed.unsqueeze(1)
        entropy = torch.zeros(mask.shape, device=mask.device)
        sampled = self.args.distillation_mode == "sampled_token"
        teacher_logp = torch.zeros(mask.shape, device=mask.device)
        choices = batch.get("choices")
        hidden: list[Tensor | None] = [None] * mask.size(0)

        prompts = {
            i: teacher_prompt_ids(
                self._prompts[i],
                plan.demonstrations[i],
                plan.feedback[i],
                self._templates,
                lambda prompt: self._tokenize_prompts([prompt])[0][0],
                self._tokenizer,
                self.args.max_reprompt_len,
            )
            for i in rows
        }
        head = None
        for chunk in self._teacher_chunks(rows):
            real = [i for i in chunk if i in prompts]
            contexts = [prompts.get(i, [self._tokenizer.pad_token_id]) for i in chunk]
            states = self._teacher_forward(contexts, chunk, batch)
            head = head or self.teacher.head()
            keep = omega[chunk][:, : states.size(1)]
            flat = states[keep]
            allowed = None if choices is None else choices[chunk][omega[chunk]]
            if not real:  # a rank without rows keeps a sharded teacher's collectives in step
                hidden_entropy(flat[:0], head, self.temperature)
                if sampled:
                    hidden_logp(flat[:0], head, batch["completion_ids"][0, :0], self.temperature)
                continue
            nats = hidden_entropy(flat, head, self.temperature, allowed)
            entropy[chunk] = entropy[chunk].masked_scatter(omega[chunk], nats)
            if sampled:
                tokens = batch["completion_ids"][chunk][omega[chunk]]
                logp = hidden_logp(flat, head, tokens, self.temperature, allowed)
                teacher_logp[chunk] = teacher_logp[chunk].masked_scatter(omega[chunk], logp)
            else:
                for i, states_i in zip(chunk, flat.split(keep.sum(dim=1).tolist()), strict=True):
                    hidden[i] = states_i
        self._teacher_head = head

        beta = self.args.entropy_weight_beta if self.objective != "sdpo" else 0.0  # plain SDPO weighs tokens alike
        weights = entropy_weights(entropy, omega, beta, self.accelerator.gather)
        distilled = self._log_teacher(entropy, weights, omega)
        targets: dict[str, Any] = {
            "routed": plan.routed,
            "distillation_weights": weights,
            "distilled_tokens": distilled,
        }
        if sampled:
            targets["teacher_logps"] = teacher_logp
        else:
            targets["teacher_hidden"] = hidden
        return targets

    def _teacher_targets(self, inputs: dict[str, Any], omega: Tensor) -> TeacherTargets | None:
        """What the student's forward compares itself with; None where no rank has a distilled token."""
        if "teacher_hidden" not in inputs or self._teacher_head is None:
            return None
        tokens = int(omega.sum())
        chunks = math.ceil(tokens / CHUNK_TOKENS)
        if self.teacher.sharded:  # the student's head is gathered once per chunk, by all ranks together
            chunks = int(self.accelerator.gather(torch.tensor([chunks], device=omega.device)).max())
        if chunks == 0:
            return None
        rows = [h for h in inputs["teacher_hidden"] if h is not None]
        hidden = torch.cat(rows) if rows else torch.zeros(0, self.teacher.width, device=omega.device)
        choices = inputs.get("choices")
        allowed = None if choices is None else choices[omega]
        return TeacherTargets(omega, hidden, self._teacher_head, self._divergence, allowed, chunks)

    def _teacher_chunks(self, rows: list[int]) -> list[list[int]]:
        size = self.args.per_device_train_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.teacher.sharded:  # every rank must enter every forward of a sharded model
            longest = int(self.accelerator.gather(torch.tensor([len(chunks)], device=self.accelerator.device)).max())
            chunks += [[0]] * (longest - len(chunks))
        return chunks

    def _teacher_forward(self, prompts: list[list[int]], rows: list[int], batch: dict[str, Any]) -> Tensor:
        """[n, L, D'] hidden states that predict the first L completion tokens, L the longest of these rows."""
        device = batch["completion_ids"].device
        attention = batch["completion_mask"][rows]
        length = max(int(attention.sum(dim=1).max()), 1)
        ids = [torch.tensor(p, device=device) for p in prompts]
        prompt_ids = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        prompt_mask = pad([torch.ones_like(p) for p in ids], padding_value=0, padding_side="left")
        sequences = torch.cat([prompt_ids, batch["completion_ids"][rows][:, :length]], dim=1)
        mask = torch.cat([prompt_mask, attention[:, :length]], dim=1)
        with self.accelerator.autocast():
            return self.teacher.score(sequences, mask, length)

    def _log_teacher(self, entropy: Tensor, weights: Tensor, omega: Tensor) -> Tensor:
        """Log the weights of this generation batch; returns the number of distilled tokens on all ranks, 0-d."""
        sums = torch.stack([omega.sum().float(), weights.sum(), weights.square().sum(), (entropy * omega).sum()])
        count, total, squares, nats = self._sum_over_ranks(sums)
        largest = self.accelerator.gather(weights.amax() if weights.numel() else weights.new_zeros(())).max()
        if count > 0:
            metrics = self._metrics["train"]
            metrics["srpo/weight_mean"].append((total / count).item())
            metrics["srpo/weight_max"].append(largest.item())
            metrics["srpo/weight_ess"].append((total**2 / (count * squares.clamp(min=1e-12))).item())
            metrics["srpo/teacher_entropy"].append((nats / count).item())
        return count
