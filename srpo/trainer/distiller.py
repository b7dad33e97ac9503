"""Who is distilled, and the teacher's pass over those rows: once per generation batch, before the first update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import pad

from srpo.objectives import Head, Objective, entropy_weights
from srpo.objectives.branches import distilled_by
from srpo.objectives.divergence import hidden_entropy, hidden_logp
from srpo.teacher.lm_head import Divergence, TeacherTargets
from srpo.teacher.prompt import Rollout, Templates, choose_demonstrations, strip_thinking, teacher_prompt_ids
from srpo.teacher.teacher import Teacher
from srpo.texts import unfinished
from srpo.trainer.generation_step import GenerationStep
from srpo.types import FEEDBACK

HEAD_PARTS = ("weight", "bias", "softcap", "scale")


@dataclass(frozen=True)
class Plan:
    """Who is distilled from what: one entry per completion of this rank."""

    distilled: Tensor  # [B] bool
    demonstrations: list[str | None]
    feedback: list[str | None]


def nothing_distilled(mask: Tensor) -> dict[str, Any]:
    """What `Distiller.targets` adds to a batch, where nothing is distilled; `mask` [B, T] of trained tokens."""
    return {
        "distilled": torch.zeros(mask.size(0), dtype=torch.bool, device=mask.device),
        "distillation_weights": torch.zeros(mask.shape, device=mask.device),
        "distilled_tokens": torch.zeros((), device=mask.device),
    }


class Distiller:
    """What distilled tokens are pulled towards, and how much each weighs.

    Args:
        objective: says who is distilled, and whether tokens weigh by the teacher's entropy.
        student, twin: as in `srpo.teacher.teacher.Teacher`.
        tokenize: prompts -> their ids, as the trainer makes them.
        metrics: of training; name -> values until the next log.
    """

    def __init__(
        self,
        objective: Objective,
        student: torch.nn.Module,
        twin: PreTrainedModel | None,
        args: Any,
        accelerator: Accelerator,
        tokenizer: Any,
        tokenize: Callable[[list[Any]], list[list[int]]],
        metrics: Any,
    ) -> None:
        self.objective, self.args = objective, args
        batches = args.steps_per_generation * args.num_iterations
        rate, snapshot = args.teacher_update_rate, batches > args.gradient_accumulation_steps
        self.teacher = Teacher(args.teacher_model_kind, student, twin, rate, accelerator, snapshot)
        self.accelerator, self.metrics = accelerator, metrics
        self.temperature = args.temperature
        self._tokenizer, self._tokenize = tokenizer, tokenize
        self._templates = Templates(args.reprompt_template, args.solution_template, args.feedback_template)
        self._divergence = Divergence(
            alpha=args.distillation_alpha,
            top_k=args.distillation_topk if args.distillation_mode == "topk_logits" else None,
            tail=args.distillation_add_tail,
            temperature=args.temperature,
        )
        self._head: Head | None = None
        """The teacher's, of the batch that is being trained on."""

    def batch(
        self, step: GenerationStep, batch: dict[str, Any], correct: Tensor, mask: Tensor
    ) -> tuple[dict[str, Any], list[str | None]]:
        """What a generation batch has to carry along, and the branch that each completion of this rank takes.

        Args:
            correct: [B] bool.
            mask: [B, T] of trained tokens.
        """
        plan = self.plan(step, correct, mask)
        rewarded = "grpo" if self.objective.rewards_others else None
        branches = ["sdpo" if distilled else rewarded for distilled in plan.distilled.tolist()]
        return self.targets(batch, mask, plan, step.prompts), branches

    def plan(self, step: GenerationStep, correct: Tensor, mask: Tensor) -> Plan:
        """Decide on all ranks' completions together, since a group may straddle ranks; keep this rank's part."""
        args, n = self.args, mask.size(0)
        texts = self._tokenizer.batch_decode(step.completion_ids, skip_special_tokens=True)
        texts = [unfinished(tag, text) if tag else text for tag, text in zip(step.opened, texts, strict=True)]
        feedback = step.columns.get(FEEDBACK) or [""] * n
        rollouts = gather_object(
            [
                Rollout(text if ok else "", ok, cut, float(reward), str(note or ""))
                for text, ok, cut, reward, note in zip(
                    texts, correct.tolist(), step.truncated, step.rewards.tolist(), feedback, strict=True
                )
            ]
        )
        chosen = choose_demonstrations(
            rollouts, args.num_generations, args.demonstration, f"{args.seed}:{step.number}"
        )
        start = self.accelerator.process_index * n
        demonstrations, notes = [], []
        for i in range(start, start + n):
            sibling = None if chosen[i] is None else rollouts[chosen[i]].text
            if sibling is not None and args.remove_thinking_from_demonstration:
                sibling = strip_thinking(sibling)
            wanted = args.include_environment_feedback and rollouts[i].feedback.strip() != ""
            if sibling is not None and args.environment_feedback_only_without_solution:
                wanted = False
            demonstrations.append(sibling)
            notes.append(rollouts[i].feedback if wanted else None)
        told = [d is not None or f is not None for d, f in zip(demonstrations, notes, strict=True)]
        available = torch.tensor(told, device=mask.device)
        trainable = ~torch.isnan(step.rewards) & (mask.sum(dim=1) > 0)
        assert self.objective.branch is not None
        distilled = distilled_by(self.objective.branch, correct, available) & trainable
        self._log_branches(distilled, ~correct, available)
        return Plan(distilled, demonstrations, notes)

    def _log_branches(self, distilled: Tensor, failed: Tensor, available: Tensor) -> None:
        shares = torch.stack([distilled.float(), failed.float(), (failed & available).float()], dim=1)
        totals = self.accelerator.gather(shares).sum(dim=0)
        count = distilled.numel() * self.accelerator.num_processes
        self.metrics["srpo/distilled_share"].append((totals[0] / count).item())
        self.metrics["srpo/failed_share"].append((totals[1] / count).item())
        self.metrics["srpo/teacher_available"].append((totals[2] / totals[1].clamp(min=1)).item())

    def targets(self, batch: dict[str, Any], mask: Tensor, plan: Plan, prompts: Sequence[Any]) -> dict[str, Any]:
        """Score the distilled rows. Everything per row has length B, so that TRL can shuffle and split it."""
        rows = plan.distilled.nonzero().flatten().tolist()
        omega = mask.bool() & plan.distilled.unsqueeze(1)
        entropy = torch.zeros(mask.shape, device=mask.device)
        sampled = self.args.distillation_mode == "sampled_token"
        teacher_logp = torch.zeros(mask.shape, device=mask.device)
        choices = batch.get("choices")
        hidden: list[Tensor | None] = [None] * mask.size(0)

        told = [(prompts[i], plan.demonstrations[i], plan.feedback[i]) for i in rows]
        room = self.args.max_reprompt_len
        asked = teacher_prompt_ids(told, self._templates, self._tokenize, self._tokenizer, room) if rows else []
        contexts = dict(zip(rows, asked, strict=True))
        head = None
        for chunk in self._chunks(rows):
            real = [i for i in chunk if i in contexts]
            shown = [contexts.get(i, [self._tokenizer.pad_token_id]) for i in chunk]
            states = self.score(shown, chunk, batch)
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

        beta = self.args.entropy_weight_beta if self.objective.teacher_weights else 0.0
        weights = entropy_weights(entropy, omega, beta, self.accelerator.gather)
        count = self._log_teacher(entropy, weights, omega)
        # Also where this rank has no distilled row: groups may come from others (`srpo.trainer.balance`).
        self._head = self.teacher.head() if head is None and count > 0 else head
        targets: dict[str, Any] = {
            "distilled": plan.distilled,
            "distillation_weights": weights,
            "distilled_tokens": count,
        }
        if sampled:
            targets["teacher_logps"] = teacher_logp
        else:
            targets["teacher_hidden"] = hidden
        return targets

    def student_targets(self, inputs: dict[str, Any], omega: Tensor) -> TeacherTargets | None:
        """What the student's forward compares itself with; None where no rank has a distilled token."""
        if "teacher_hidden" not in inputs or self._head is None:
            return None
        tokens = int(omega.sum())
        if self.teacher.sharded:  # the student's head is gathered by all ranks together, or by none
            tokens = int(self.accelerator.gather(torch.tensor([tokens], device=omega.device)).max())
        if tokens == 0:
            return None
        rows = [h for h in inputs["teacher_hidden"] if h is not None]
        hidden = torch.cat(rows) if rows else torch.zeros(0, self.teacher.width, device=omega.device)
        choices = inputs.get("choices")
        allowed = None if choices is None else choices[omega]
        return TeacherTargets(omega, hidden, self._head, self._divergence, allowed)

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        size = self.args.per_device_train_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.teacher.sharded:  # every rank must enter every forward of a sharded model
            longest = int(self.accelerator.gather(torch.tensor([len(chunks)], device=self.accelerator.device)).max())
            chunks += [[0]] * (longest - len(chunks))
        return chunks

    def score(self, prompts: list[list[int]], rows: list[int], batch: dict[str, Any]) -> Tensor:
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
        count, total, squares, nats = self.accelerator.reduce(sums, reduction="sum")
        largest = self.accelerator.gather(weights.amax() if weights.numel() else weights.new_zeros(())).max()
        if count > 0:
            metrics = self.metrics
            metrics["srpo/weight_mean"].append((total / count).item())
            metrics["srpo/weight_max"].append(largest.item())
            metrics["srpo/weight_ess"].append((total**2 / (count * squares.clamp(min=1e-12))).item())
            metrics["srpo/teacher_entropy"].append((nats / count).item())
        return count

    # The head of a batch that several optimiser steps use, where the teacher's own has moved on by a checkpoint.

    def head_parts(self) -> dict[str, Any] | None:
        """What of it a checkpoint inside a generation batch must hold."""
        if self._head is None or not self.teacher.snapshots_head:
            return None
        return {key: getattr(self._head, key) for key in HEAD_PARTS}

    def restore_head(self, parts: dict[str, Any] | None) -> None:
        """Take what `head_parts` gave."""
        self._head = self.teacher.head() if parts is None else Head(**parts)
