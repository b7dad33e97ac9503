"""The trainer core: one training step, told in order, on top of TRL's GRPOTrainer.

    rows -> rollout (TRL, or an environment's episodes)                            [_generate, _generate_single_turn]
         -> world's columns -> rewards (TRL)                                       [_calculate_rewards]
         -> old and reference log-probs, advantages (TRL)                          [_get_per_token_logps_and_entropies]
         -> credit, who is distilled, the teacher re-scores those rows, weights    [_generate_and_score_completions]
         -> one student forward -> objective                                       [compute_loss, _compute_loss]
         -> backward                                                               [training_step]
         -> teacher moves, once per generation batch

Every hook of TRL's is overridden here, once; what one hook learns of a generation batch the next finds in a
`GenerationStep`. An objective is a record (`srpo.objectives.OBJECTIVES`); `grpo` runs TRL's own loss untouched. Each
hook has a test that fails when TRL moves it (tests/srpo/test_trl_hooks.py).
"""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from srpo.checks import checked_reward, distinct
from srpo.columns import (
    LOST_ROW,
    TABLE_COLUMNS,
    as_list,
    check_dataset_columns,
    check_extra,
    check_no_pictures,
    check_reward_names,
    checked_columns,
    checked_metric,
    repaired_value,
    well_formed,
    without_pictures,
)
from srpo.config import SRPOConfig, as_srpo_config, kept_defaults
from srpo.hub.hub import HubMixin
from srpo.objectives import Counts, LossConfig, LossOutput, TokenBatch, objective_of, sampled_token_divergence
from srpo.objectives.advantages import REFERENCES
from srpo.objectives.batch import per_step
from srpo.replay.metrics import audited
from srpo.replay.passes import ReplayPasses, engine_that_replay_needs
from srpo.rollout.loop import as_columns
from srpo.rollout.sampler_logprobs import SampledLogProbs, batch_mismatch, prompt_width, settle_ends
from srpo.rollout.sampling_rules import own_settings_aside
from srpo.rollout.thinking import opened_by
from srpo.rollout.vllm_settings import vllm_of
from srpo.run.steps import check_eval_rows, check_rows_of_a_batch, check_steps_left, check_steps_made
from srpo.teacher.lm_head import add_distillation_head
from srpo.teacher.masked_decisions import add_choice_head, scored_among
from srpo.teacher.teacher import Teacher, unpatched_copy
from srpo.trainer.adapters import prepare_adapter
from srpo.trainer.checkpoint import Checkpoints, Clock, load_renamed_weights
from srpo.trainer.credit import credited
from srpo.trainer.distiller import Distiller, nothing_distilled
from srpo.trainer.engines import gather_when_saving, saved_whole
from srpo.trainer.forward_checks import ForwardChecks, still
from srpo.trainer.generation_step import Correctness, GenerationStep
from srpo.trainer.limits import RunLimits, refuse_other_rollouts, refuse_settings_of_episodes, without_trl_warning
from srpo.trainer.metrics import TRUNCATED, Alarms, CompletionsTable, world_metrics
from srpo.trainer.precision import check_precision, engine_keeps_masters, train_in_fp32
from srpo.trainer.reference import Reference, reference_of
from srpo.trainer.rollouts import Rollouts
from srpo.types import FEEDBACK, LOST, Columns, Environment, World

logger = logging.get_logger(__name__)


class SRPOTrainer(HubMixin, TRLGRPOTrainer):
    """GRPO, SDPO, SRPO and BoPO in one trainer; every argument of `trl.GRPOTrainer`, and five more.

    Args:
        world: called once per batch with (rows, completion texts); its columns reach the reward functions, the
            completions table and the metrics (see `srpo.types`).
        environment: in place of `world`: makes an episode per completion, which policy and world play in turns
            (`srpo.rollout.loop`). Its columns are used like a world's.
        correctness: which completions count as correct, from the summed rewards [B] and the columns. Default: the
            reward reaches `success_reward_threshold`. Truncated completions never count as correct.
        recipe: the resolved recipe, for the model card.
        save_beside: called with every folder that the weights were written to, before it is pushed: checkpoints, the
            last weights, the Hub. The process that writes calls it alone, so it must not wait for others.

    Raises:
        ValueError: for vision-language models with an objective of ours, and for arguments that contradict.
    """

    _tag_names = ("trl", "srpo")
    # Of TRL's trainer; set here too.
    log_completions: bool
    mask_truncated_completions: bool
    _last_loaded_step: int

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *rest: Any,
        world: World | None = None,
        environment: Environment | None = None,
        correctness: Correctness | None = None,
        recipe: dict[str, Any] | None = None,
        save_beside: Callable[[Path], object] | None = None,
        **kwargs: Any,
    ):
        args = _checked_config(args)
        gather_when_saving(args)
        self.objective, self._record = args.objective, objective_of(args)
        self.recipe, self.save_beside = recipe, save_beside
        self.heldout_table: str | None = None
        self.world, self.environment, self.correctness = world, environment, correctness
        self.generation_step = GenerationStep()
        self._train_sampler: Any = None

        # `rest` are TRL's further arguments by position.
        given = inspect.signature(TRLGRPOTrainer).bind(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        peft_config = given.arguments.get("peft_config")
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        distils = self._record.distils(args)
        if not isinstance(model, str) and not has_adapter:
            train_in_fp32(model, args)  # before it is copied: teacher and reference take the policy's precision
        needs_copy = distils and args.teacher_model_kind != "live" and not has_adapter
        in_fp32 = args.teacher_model_kind == "ema" or not engine_keeps_masters(args)
        twin = unpatched_copy(model, _init_kwargs(args), in_fp32) if needs_copy else None
        for data in datasets_of(given.arguments):
            check_dataset_columns(getattr(data, "column_names", None) or (), environment is not None)
        if environment is not None:
            refuse_other_rollouts(args, given.arguments, world)
        else:
            refuse_settings_of_episodes(args)

        with (
            vllm_of(self, args),
            engine_that_replay_needs(args),
            reference_of(model, peft_config, args) as own_reference,
        ):
            super().__init__(model, _checked_rewards(reward_funcs), args, train_dataset, *rest, **kwargs)
        self.beta = args.beta
        engine = self.vllm_generation if self.use_vllm else None
        self.reference = Reference(self.model, self.ref_model, own_reference, self.accelerator)
        refused = self._is_vlm or bool(getattr(self, "tools", None))
        self.replay_passes = ReplayPasses(self.model, args, refused, engine)
        if not self._is_vlm:
            for data in datasets_of(given.arguments):
                check_no_pictures(data)
        train_in_fp32(self.model, args)
        if is_peft_model(self.model):
            prepare_adapter(self.model, self.accelerator)
        self.eos_token_ids = settle_ends(self.model, self._tokenizer, args, self.generation_config, engine)
        if engine is None:
            pad = self._tokenizer.pad_token_id
            self.generation_kwargs.update(eos_token_id=self.eos_token_ids, pad_token_id=pad)
        check_reward_names(self.reward_func_names)
        self.table = CompletionsTable(args)
        self.alarms = Alarms(args.diagnostics_warning_interval, logger.warning)

        self.rollouts: Rollouts | None = None
        if environment is not None:
            tokenizer, masked = self._tokenizer, self.mask_truncated_completions
            self.mask_truncated_completions = False  # TRL looks at the last token; here the stop reason says it
            self.rollouts = Rollouts(environment, args, self.accelerator, tokenizer, self.num_generations, masked)
            self.add_callback(RunLimits(self.rollouts))
            for scored in filter(None, (self.model, self.ref_model)):
                add_choice_head(self._base(scored), self.temperature)
        self.add_callback(Clock(self._begin_training, self._end_step))
        self.teacher: Teacher | None = None
        self.distiller: Distiller | None = None
        if self._record.loss is not None:
            self._set_up_loss(args)
        if distils:
            self._set_up_teacher(args, twin)
        self.checkpoints = Checkpoints(self.accelerator, self.reference, self.distiller, self.rollouts)
        self._check_forwards(args)

    def _set_up_loss(self, args: SRPOConfig) -> None:
        """What TRL's own loss has no use for."""
        if self._is_vlm:
            raise ValueError(
                f"objective: {self.objective} trains text models only; use objective: grpo and a loss_type of TRL's"
            )
        add_distillation_head(self._base(self.model))
        self._loss_config = LossConfig(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            level=self.importance_sampling_level,
            beta=self.beta,
            correct_kl=args.use_bias_correction_kl,
            is_clip=args.distillation_is_clip,
            aggregation=args.distillation_aggregation,
            cap=args.minirl_cap,
            length=self.max_completion_length,
        )

    def _set_up_teacher(self, args: SRPOConfig, twin: PreTrainedModel | None) -> None:
        snapshot = self._generate_every > args.gradient_accumulation_steps
        self.teacher = Teacher(
            args.teacher_model_kind, self.model, twin, args.teacher_update_rate, self.accelerator, snapshot
        )
        self.distiller = Distiller(
            self._record,
            self.teacher,
            args,
            self.accelerator,
            self._tokenizer,
            lambda prompt: self._tokenize_prompts([prompt])[0][0],
            self.num_generations,
            self.temperature,
            self._metrics["train"],
        )
        self._branch_gradients = torch.zeros(2, device=self.accelerator.device)  # squared norms: distilled, rewarded

    def _check_forwards(self, args: SRPOConfig) -> None:
        """At the end of construction: every model of the trainer exists."""
        if args.disable_dropout:
            for model in filter(None, (self.model, self.ref_model)):
                still(model)
        if not self._is_vlm:
            teacher = None if self.teacher is None else self.teacher.model
            others = [self._base(m) for m in (self.ref_model, teacher) if m is not None]
            base, autocast = self._base(self.model), self.accelerator.autocast
            self.add_callback(ForwardChecks(self.model, base, others, args, autocast))

    def _base(self, model: torch.nn.Module) -> PreTrainedModel:
        """The transformers model inside."""
        base = self.accelerator.unwrap_model(model)
        return base.get_base_model() if is_peft_model(base) else base

    def _add_metrics(self, mode: str, values: Mapping[str, float]) -> None:
        """TRL averages what is appended until the next log."""
        for name, value in values.items():
            self._metrics[mode][name].append(float(value))

    # ---------------------------------------------------------------------------------------- one generation batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = inputs if self._is_vlm else without_pictures(inputs)
        step = self.generation_step = GenerationStep(rows, self.model.training, self.state.global_step)
        own_reference = self.reference.weights is not None
        beta, self.beta = self.beta, 0.0 if own_reference else self.beta  # TRL's is the model without its adapter
        try:
            batch = super()._generate_and_score_completions(rows)
        finally:
            self.beta = beta
        if own_reference:
            score = self._get_per_token_logps_and_entropies
            batch["ref_per_token_logps"] = self.reference.logps(batch, score, self.args)
        step.scored = True
        self._add_metrics(step.mode, batch_mismatch(batch, self._sum_over_ranks))
        if step.choices is not None:
            batch["choices"] = step.choices
        batch |= self.replay_passes.batch(step, batch)
        mask = _loss_mask(batch)
        if step.training and self._record.credit is not None:
            self._credit(step, batch)
        branches: list[str | None] = ["grpo"] * len(rows)
        if step.training and self.distiller is not None:
            plan = self.distiller.plan(step, self._correct(step), mask)
            batch |= self.distiller.targets(batch, mask, plan, step.prompts)
            rewarded = "grpo" if self._record.rewards_others else None
            branches = ["sdpo" if z else rewarded for z in plan.distilled.tolist()]
        elif self._record.loss is not None and (step.training or self._record.branch is None):
            batch |= nothing_distilled(mask)
        self._logs["extra"]["branch"].extend(gather_object(branches))
        return batch

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        step = self.generation_step
        if self.rollouts is None:
            output, recorder = super()._generate(prompts), None
            prompt_ids = output[0]
        else:
            prompt_ids = self._tokenize_prompts(prompts)[0]
            in_training = getattr(self, "is_in_train", False)
            with self.replay_passes.turns(step) as recorder, self._generator(recorder) as generator:
                played = self.rollouts.play(step, prompt_ids, isinstance(prompts[0], str), generator, in_training)
            output = played.output
            if step.training:
                self.state.num_input_tokens_seen += played.tokens
            self._metrics[step.mode]["num_tokens"] = [self.state.num_input_tokens_seen]
            self._add_metrics(step.mode, played.metrics)
        step.opened = [opened_by(self._tokenizer, ids) for ids in prompt_ids]
        self.replay_passes.take(step, output, recorder)
        return output

    def _generator(self, recorder: Any) -> Any:
        """A context: the policy's generator for one batch of episodes."""
        assert self.rollouts is not None
        if not self.use_vllm:
            return self.rollouts.policy(self.model_wrapped, self._dist, self.eos_token_ids, recorder)
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        return nullcontext(self.rollouts.vllm(self.vllm_generation, self.eos_token_ids))

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step, passes = self.generation_step, self.replay_passes
        sample = partial(super()._generate_single_turn, prompt_ids, *args, **kwargs)
        if self.use_vllm:
            completion_ids, logprobs = sample()
        else:
            policy = self.accelerator.unwrap_model(self.model)
            with passes.sampling(step), own_settings_aside(policy):
                completion_ids, logprobs = self._sampled_here(sample, prompt_ids)
        passes.sampled(step, prompt_ids, completion_ids)
        return completion_ids, logprobs

    def _sampled_here(self, sample: Callable[[], tuple[Any, Any]], prompt_ids: Any) -> tuple[Any, Any]:
        """By transformers, with log-probs where something reads them."""
        wanted = self._record.sampler_logps or self.args.routing_replay != "off"
        if not wanted or self.args.use_transformers_continuous_batching or not self.model.training:
            return sample()
        width = prompt_width(prompt_ids, self.pad_to_multiple_of)
        with SampledLogProbs(self._base(self.model), self.temperature, width) as sampled:
            completion_ids, logprobs = sample()
        return completion_ids, sampled.of(completion_ids) if logprobs is None else logprobs

    # ------------------------------------------------------------------------------------------------ rewards

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        step = self.generation_step
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        step.opened = step.opened or [""] * len(texts)
        step.rows = inputs
        texts = [o + t for o, t in zip(step.opened, texts, strict=True)]
        if step.trajectories is not None:
            columns = as_columns(step.trajectories)
        else:
            columns = {} if self.world is None else self.world(inputs, texts)
        taken = {*self.reward_func_names, *TABLE_COLUMNS}
        step.columns, repaired = checked_columns(columns, inputs, taken)
        rows = [self._with_columns(step.columns, i, row) for i, row in enumerate(inputs)]
        step.references = [row.get(REFERENCES) for row in rows]
        lost = [row.get(LOST_ROW) is not None for row in rows]
        with without_trl_warning() if any(lost) else nullcontext():
            rewards_per_func = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        if self.world is not None or self.environment is not None:
            # A lost rollout has no reward, whatever a reward model says of it.
            everyone = torch.tensor(gather_object(lost), device=rewards_per_func.device)
            rewards_per_func = rewards_per_func.masked_fill(everyone.unsqueeze(1), torch.nan)
        # A reward function may give feedback too, through TRL's `log_extra`; it wins over the world's.
        if FEEDBACK in self._pending_extra_logs:
            step.columns[FEEDBACK] = list(self._pending_extra_logs[FEEDBACK])
        for name, values in step.columns.items():
            self._pending_extra_logs[name] = list(values)
        for name in {*self._logs["extra"]} - {*self._pending_extra_logs, "branch"}:
            self._pending_extra_logs[name] = [None] * len(texts)  # else the table would show an earlier batch's

        step.prompts = prompts  # as the policy saw them: an environment may have added its first observation
        step.completion_ids = completion_ids_list
        step.truncated = self._cut_short(step)
        start = self.accelerator.process_index * len(prompts)
        local = rewards_per_func[start : start + len(prompts)]
        total = (local * self.reward_weights.to(local.device)).nansum(dim=1)
        step.rewards = total.masked_fill(torch.isnan(local).all(dim=1), torch.nan)
        self._log_world(step, repaired)
        return rewards_per_func

    def _with_columns(self, columns: Columns, i: int, row: dict[str, Any]) -> dict[str, Any]:
        """A dataset row as the rewards see it, with the world's columns; these may repeat the dataset's values."""
        found = {name: values[i] for name, values in columns.items()}
        whole = {**row, **{name: value for name, value in found.items() if value is not None or name not in row}}
        if self.world is not None or self.environment is not None:
            whole[LOST_ROW] = found.get(LOST) or None
        return whole

    def _cut_short(self, step: GenerationStep) -> list[bool]:
        """Which completions a limit ended."""
        if step.trajectories is not None:
            return [t.stop in TRUNCATED for t in step.trajectories]
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return [not len(ids) or int(ids[-1]) not in ends for ids in step.completion_ids]

    def _log_world(self, step: GenerationStep, repaired: list[str]) -> None:
        names = sorted(set(gather_object(list(step.columns))))  # a rank may lack a column, but not a collective
        missing = [None] * len(step.truncated)
        gathered = {name: gather_object(list(step.columns.get(name, missing))) for name in names}
        self._add_metrics(step.mode, world_metrics(gathered))
        if everywhere := gather_object(repaired):
            self._add_metrics(step.mode, {"records/repaired": len(everywhere)})
            what = f"texts of the world are no valid Unicode, and were repaired: {everywhere[0]}"
            self.table.say(what, self.state.global_step)

    def _correct(self, step: GenerationStep) -> Tensor:
        return step.correct(self.args.success_reward_threshold, self.correctness)

    def _credit(self, step: GenerationStep, batch: dict[str, Any]) -> None:
        everyone = credited(self._record, step, self._correct(step), self.num_generations, self.args, self.accelerator)
        start = self.accelerator.process_index * len(step.rows)
        batch["advantages"] = everyone[start : start + len(step.rows)]
        logged = self._logs["advantages"]
        for _ in range(len(everyone)):
            logged.pop()
        logged.extend(everyone.tolist())
        self._add_metrics("train", {f"{self.objective}/below_baseline": (everyone < 0).float().mean().item()})

    # ------------------------------------------------------------------------------------------------ scoring

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        step = self.generation_step
        choices = None if step.scored else step.choices  # of a loss: `_compute_loss` has set its own
        with self._among(model, choices), self.replay_passes.old_pass(step, model, attention_mask):
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

    # --------------------------------------------------------------------------------------------------- loss

    def _among(self, model: torch.nn.Module, choices: Tensor | None) -> Any:
        """A context: passes of the model score their tokens among `choices`, where there are any."""
        return nullcontext() if choices is None else scored_among(self._base(model), choices)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        first = self._step % self.current_gradient_accumulation_steps == 0
        if self.replay_passes.audit_due(inputs, self.state.global_step, first):
            self._audit(inputs)
        self.replay_passes.arm(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _audit(self, inputs: dict[str, Any]) -> None:
        ids, attention, length = _sequences(inputs)

        def score() -> Tensor:
            with self._among(self.model, inputs.get("choices")):
                return self._get_per_token_logps_and_entropies(self.model, ids, attention, length)[0]

        assert self.replay_passes.replay is not None
        clip = (self.epsilon_low, self.epsilon_high)
        self._add_metrics("train", audited(score, self.replay_passes.replay, inputs, clip, self.accelerator))

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self._among(model, inputs.get("choices")):
            if self._record.loss is None or "distilled" not in inputs:  # TRL's own, and where there is no teacher
                return super()._compute_loss(model, inputs)
            mask = _loss_mask(inputs)
            logp, entropy, divergence, aux_loss = self._policy_forward(model, inputs, mask)
        old_logp = inputs.get("old_per_token_logps")
        batch = TokenBatch(
            logp=logp,
            old_logp=logp.detach() if old_logp is None else old_logp,
            mask=mask,
            advantages=inputs["advantages"],
            distilled=inputs["distilled"],
            divergence=divergence,
            weights=inputs["distillation_weights"],
            counts=self._counts(inputs, mask.size(0)),
            sampler_ratio=inputs.get("importance_sampling_ratio"),
            ref_logp=inputs.get("ref_per_token_logps"),
            sampler_logp=inputs.get("sampling_per_token_logps"),
        )
        output = self._record.loss(batch, self._loss_config)
        self._log_loss(output, entropy, mask)
        loss = output.loss
        if self.aux_loss_enabled:
            assert aux_loss is not None
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation
            self._add_metrics(self._mode, {"aux_loss": self.accelerator.gather(aux_loss.detach()).mean().item()})
        return loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _accumulation(self) -> int:
        """Micro-batches of an optimiser step."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _counts(self, inputs: dict[str, Any], rows: int) -> Counts:
        """Denominators of one optimiser step; a generation batch may feed several (`per_step`)."""
        ranks = self.accelerator.num_processes
        batches = self.args.steps_per_generation if self.model.training else 1
        share = partial(per_step, ranks=ranks, accumulation=self._accumulation, steps_per_generation=batches)
        completions = torch.tensor(float(rows * batches * ranks), device=inputs["distilled"].device)
        return Counts(share(inputs["num_items_in_batch"]), share(inputs["distilled_tokens"]), share(completions))

    def _policy_forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One forward of the student: log-probs, entropies, divergences [B, T], and the MoE auxiliary loss."""
        ids, attention, length = _sequences(inputs)
        labels = ids.masked_fill(attention == 0, -100)  # completion tokens only, as in TRL
        labels[:, :-length] = -100
        distilled = inputs["distilled"]
        omega = mask.bool() & distilled.unsqueeze(1)
        extra: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        if self.distiller is not None:
            extra["targets"] = self.distiller.student_targets(inputs, omega)

            def probe(gradient: Tensor) -> None:
                squares = gradient.float().square().sum(dim=(1, 2))
                self._branch_gradients += torch.stack([squares[distilled].sum(), squares[~distilled].sum()])

            extra["gradient_probe"] = probe
        with self.accelerator.autocast():
            output = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, **extra)
        logp, entropy = output.log_probs[:, -length:], output.entropy[:, -length:]
        divergence = getattr(output, "divergence", None)
        if "teacher_logps" in inputs and omega.any():
            divergence = sampled_token_divergence(logp, inputs["teacher_logps"]) * omega
        return logp, entropy, divergence, output.aux_loss

    def _log_loss(self, output: LossOutput, entropy: Tensor, mask: Tensor) -> None:
        # The objective's metrics add up over micro-batches; TRL averages what is appended here.
        if output.metrics:
            scaled = torch.stack(list(output.metrics.values())).detach() * self._accumulation
            means = self.accelerator.gather(scaled.unsqueeze(0)).mean(dim=0).tolist()
            self._add_metrics(self._mode, dict(zip(output.metrics, means, strict=True)))
        shares = {"entropy": (entropy * mask).sum().detach(), **output.tokens}
        sums = self._sum_over_ranks(torch.stack([mask.sum(), *shares.values()]).to(entropy.dtype))
        means = (sums[1:] / sums[0].clamp(min=1)).tolist()
        self._add_metrics(self._mode, dict(zip(shares, means, strict=True)))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self.replay_passes.disarm()  # only now: the backward pass may run layers again
        if self.teacher is not None and self.accelerator.sync_gradients:
            norms = self._sum_over_ranks(self._branch_gradients).sqrt()
            if norms.sum() > 0:
                self._add_metrics("train", {"srpo/gradient_share": (norms[0] / norms.sum()).item()})
            self._branch_gradients.zero_()
        return loss

    # ------------------------------------------------------------------------------------------ start, and the clock

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        if hasattr(self.train_dataset, "__len__"):
            check_rows_of_a_batch(len(self.train_dataset), self.args)
        if self.args.eval_strategy != "no":
            check_eval_rows(self.eval_dataset, self.args, self.num_generations_eval)
        if isinstance(resume_from_checkpoint, (str, Path)):
            check_steps_left(Path(resume_from_checkpoint), self.args.max_steps)
        output = super().train(resume_from_checkpoint, *rest, **kwargs)
        check_steps_made(self.state.global_step)
        return output

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **kwargs: Any) -> Any:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, str):
            check_eval_rows(given, self.args, self.num_generations_eval)
        return super().evaluate(eval_dataset, *rest, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    @property
    def _generate_every(self) -> int:
        """Micro-steps that one generation batch feeds."""
        return self.args.steps_per_generation * self.args.num_iterations

    def _begin_training(self, state: Any) -> None:
        self.reference.begin()
        if self.teacher is not None:
            self.teacher.begin()
        # TRL counts micro-steps from 0 in each process; a resumed run must know where in a generation batch it is.
        self._step = state.global_step * self.args.gradient_accumulation_steps
        # TRL's sampler draws one permutation per epoch; a resumed run must not start with the first epoch's again.
        sampler = self._train_sampler
        if sampler is not None and sampler.shuffle:
            for _ in range(int(state.epoch or 0)):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _end_step(self) -> None:
        if self.teacher is not None and self._step % self._generate_every == 0:
            self.teacher.update()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with saved_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.save_beside is not None:
            self.save_beside(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        inside = self._step % self._generate_every != 0
        self.checkpoints.save(folder, self._buffered_inputs if inside else None, self.args.save_only_model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_experts(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_experts(self.state.best_model_checkpoint)
        self._last_loaded_step = -1  # of vLLM: these are not the weights of this step any more

    def _load_experts(self, folder: str) -> None:
        # Sharded weights have their own format, under the model's own names.
        if self.accelerator.distributed_type not in ("DEEPSPEED", "FSDP") and not is_peft_model(self.model):
            load_renamed_weights(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.refuse_other_world_size(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (batches := self.checkpoints.load(checkpoint)) is not None:
            self._buffered_inputs = batches

    # ------------------------------------------------------------------------------------------------ records

    def _log_completion_extra(self, column: str, values: Any) -> None:
        """A column that a reward function logs: checked and repaired where it comes in."""
        step = self.generation_step
        column, values = well_formed(column) if isinstance(column, str) else column, as_list(values)
        taken = {*self.reward_func_names, *TABLE_COLUMNS, *step.columns, *self._pending_extra_logs} - {FEEDBACK}
        check_extra(column, len(values), len(step.rows), taken)
        super()._log_completion_extra(column, [repaired_value(value)[0] for value in values])

    def _log_metric(self, name: str, value: float) -> None:
        super()._log_metric(name, checked_metric("log_metric", name, value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ours, step = self.log_completions, self.state.global_step
        writes = ours and self.accelerator.is_main_process
        table = self.table.take(self._logs, step, logs) if writes else {}
        self.log_completions = False  # TRL's own part of this
        try:
            super().log(logs, start_time)  # adds the averaged metrics to `logs`
        finally:
            self.log_completions = ours
        if table:
            self.table.write(table, self._logs, step)
        numbers = {name: value for name, value in logs.items() if isinstance(value, float)}
        if self.model.training:
            self.replay_passes.observe(numbers)
            self.alarms.observe_step(numbers, self.max_completion_length)
        elif "eval_reward" in numbers:
            self.alarms.observe_evaluation(numbers["eval_reward"])


class _OfObjective(SRPOTrainer):
    """An `SRPOTrainer` whose class says the objective."""

    _objective: str

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        if args is None:
            args = SRPOConfig(output_dir=f"{self._objective}-output", objective=self._objective)
        args = as_srpo_config(args)
        args.objective = self._objective
        super().__init__(model, reward_funcs, args, *rest, **kwargs)


class GRPOTrainer(_OfObjective):
    """[`SRPOTrainer`] with `objective="grpo"`: TRL's GRPO, any loss type, with this library's world and records."""

    _objective = "grpo"


class SDPOTrainer(_OfObjective):
    """[`SRPOTrainer`] with `objective="sdpo"`: every completion with teacher information is distilled."""

    _objective = "sdpo"


class BoPOTrainer(_OfObjective):
    """[`SRPOTrainer`] with `objective="bopo"`: advantages beside two reference policies, every trajectory alike."""

    _objective = "bopo"


def _sequences(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask [B, P + T] of prompt and completion, and T."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention, batch["completion_ids"].size(1)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """[B, T]: completion tokens that the policy sampled and that are trained on."""
    return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]


def datasets_of(arguments: Mapping[str, Any]) -> list[Any]:
    """The datasets among a trainer's arguments; `eval_dataset` may be several."""
    evaluation = arguments.get("eval_dataset")
    return [arguments.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]


def _checked_config(args: GRPOConfig | None) -> SRPOConfig:
    if args is None:
        args = SRPOConfig(output_dir="srpo-output")
    if not isinstance(args, SRPOConfig):
        args = as_srpo_config(args)
        if kept := kept_defaults(args):
            logger.warning(
                "args is TRL's own config: %s hold, as it says; SRPOConfig has the papers' defaults for %s",
                ", ".join(kept),
                args.objective,
            )
    args.check()
    check_precision(args)
    return args


def _checked_rewards(functions: Any) -> Any:
    if callable(functions) and not isinstance(functions, torch.nn.Module):
        functions = [functions]
    if not isinstance(functions, list):
        return functions
    plain = (str, torch.nn.Module)
    return distinct([f if isinstance(f, plain) else checked_reward(f) for f in functions])


def _init_kwargs(args: SRPOConfig) -> dict[str, Any]:
    """How TRL loads a policy that is given by its path."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return options
