"""The trainer core: one training step, told in order, on top of TRL's GRPOTrainer.

    rows -> rollout (one turn, or an environment's episodes)                       [_generate, _generate_single_turn]
         -> world's columns -> rewards (TRL)                                       [_calculate_rewards]
         -> old and reference log-probs, advantages (TRL)                          [_get_per_token_logps_and_entropies]
         -> credit, who is distilled, the teacher re-scores those rows, weights    [_generate_and_score_completions]
         -> micro-batches of whole groups                                                  [_prepare_inputs]
         -> one student forward -> objective                                       [compute_loss, _compute_loss]
         -> backward                                                               [training_step]
         -> teacher moves, once per generation batch

Every hook of TRL's is overridden here, once, with a test that fails when TRL moves it (tests/srpo/test_trl_hooks.py).
What one hook learns of a generation batch the next finds in a `GenerationStep`; an objective is a record
(`srpo.objectives.OBJECTIVES`), and `grpo` runs TRL's own loss untouched.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from srpo import columns
from srpo.hub.hub import HubMixin
from srpo.objectives import objective_of
from srpo.objectives.advantages import REFERENCES
from srpo.prefix.sharing import PrefixSharing
from srpo.replay.metrics import audited
from srpo.replay.passes import EXPERT_IDS, engine_that_replay_needs, replay_passes
from srpo.replay.replay import RoutingReplay
from srpo.rollout.generator import ALL_TOKENS
from srpo.rollout.sampler_logprobs import batch_mismatch, settle_ends
from srpo.rollout.sampling_rules import own_settings_aside, samples_itself
from srpo.rollout.thinking import opened_by
from srpo.rollout.vllm_settings import vllm_of
from srpo.run.signals import Interrupted, heeded
from srpo.run.steps import check_eval_rows, check_start, check_steps_made
from srpo.run.watch import part, watched
from srpo.run.whole import AUTO, SAVING, resume_from
from srpo.teacher import masked_decisions as masked
from srpo.teacher.lm_head import add_scoring_head
from srpo.teacher.teacher import plain_copy, unpatched_copy
from srpo.trainer import rewards
from srpo.trainer.adapters import prepare_adapter
from srpo.trainer.arguments import checked_config, datasets_of, init_kwargs, refuse_contradictions
from srpo.trainer.bad_numbers import BAD_REWARDS, BadSteps
from srpo.trainer.checkpoint import Checkpoints
from srpo.trainer.clock import Clock, calendar_of, wind
from srpo.trainer.credit import credited
from srpo.trainer.distiller import Distiller, nothing_distilled
from srpo.trainer.engines import saved_whole
from srpo.trainer.forward_checks import ForwardChecks, still
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.late import lost_rows, world_one_by_one
from srpo.trainer.limits import EarlyWarnings, EndOnSignal, RunLimits, without_trl_warning
from srpo.trainer.loss import loss_of, sequences
from srpo.trainer.metrics import Alarms, CompletionsTable, Losses, gathered_metrics
from srpo.trainer.micro_batches import micro_batches
from srpo.trainer.overlap import Ahead, refuse_ahead, rows_of_batch
from srpo.trainer.precision import engine_keeps_masters, train_in_fp32
from srpo.trainer.reference import Reference, reference_of
from srpo.trainer.rollouts import Rollouts
from srpo.trainer.sampler import Sampler
from srpo.types import FEEDBACK, Environment, World

logger = logging.get_logger(__name__)


class SRPOTrainer(HubMixin, TRLGRPOTrainer):
    """GRPO, SDPO, SRPO and BoPO in one trainer; every argument of `trl.GRPOTrainer`, and seven more.

    Args:
        world: called once per batch with (rows, completion texts); its columns reach the reward functions, the
            completions table and the metrics (see `srpo.types`).
        environment: in place of `world`: makes an episode per completion, which policy and world play in turns
            (`srpo.rollout.loop`). Its columns are used like a world's.
        correctness: which completions count as correct, from the summed rewards [B] and the columns. Default: the
            reward reaches `success_reward_threshold`. Truncated completions never count as correct.
        recipe: the resolved recipe, for the model card.
        save_beside: called with every folder that weights are written to, by the process that writes, alone.
        allowed_tokens: which ids a completion of one turn may hold. The policy samples among them, and every
            log-probability that is scored, the teacher's too, is renormalised over them.
        heldout: in place of `eval_dataset`: plays the policy, which it gets from the trainer, and returns numbers by
            name, `reward` among them. All processes call it.

    Raises:
        ValueError: for vision-language models with an objective of ours, and for arguments that contradict.
    """

    _tag_names = ("trl", "srpo")
    _objective: str | None = None
    """What the class says, whatever the configuration does."""
    # Of TRL's trainer; set here too.
    log_completions: bool
    mask_truncated_completions: bool
    tools: Any
    _last_loaded_step: int
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *rest: Any,
        world: World | None = None,
        environment: Environment | None = None,
        correctness: rewards.Correctness | None = None,
        recipe: dict[str, Any] | None = None,
        save_beside: Callable[[Path], object] | None = None,
        allowed_tokens: masked.AllowedTokens | None = None,
        heldout: Callable[[], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ):
        args = checked_config(args, self._objective)
        self.objective, self._record = args.objective, objective_of(args)
        self.recipe, self.save_beside = recipe, save_beside
        self.heldout_table: str | None = None
        self.heldout_results: Sequence[Mapping[str, Any]] = ()
        late = args.world_deadline
        self.world = world if world is None or late is None else world_one_by_one(world, late)
        self.environment = environment
        self.correctness, self.allowed_tokens, self.heldout = correctness, allowed_tokens, heldout
        self.generation_step = GenerationStep(scored=True)  # a resumed run may begin inside of one
        self._train_sampler: Any = None
        self.calendar = calendar_of(None, args)
        self._evaluated = 0  # batches of an evaluation

        # `rest` are TRL's further arguments by position.
        given = inspect.signature(TRLGRPOTrainer).bind(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        peft_config = given.arguments.get("peft_config")
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        distils = self._record.distils(args)
        if not isinstance(model, str) and not has_adapter:
            train_in_fp32(model, args)  # before it is copied: teacher and reference take the policy's precision
        needs_copy = distils and args.teacher_model_kind != "live" and not has_adapter
        in_fp32 = args.teacher_model_kind == "ema" or not engine_keeps_masters(args)
        twin = unpatched_copy(model, init_kwargs(args), in_fp32) if needs_copy else None
        refuse_contradictions(args, given.arguments, world, environment, allowed_tokens)

        with (
            vllm_of(self, args),
            engine_that_replay_needs(args),
            reference_of(model, peft_config, args) as own_reference,
        ):
            functions = rewards.checked_rewards(
                reward_funcs,
                lambda words: self.bad_steps.reward(words),
                args.reward_deadline,
                lambda causes: self.generation_step.lose(causes),
            )
            evaluated = args.eval_strategy
            if heldout is not None:
                args.eval_strategy = IntervalStrategy.NO  # else transformers asks for an eval_dataset
            super().__init__(model, functions, args, train_dataset, *rest, **kwargs)
            args.eval_strategy = evaluated
        self.beta = args.beta
        self.args.logging_nan_inf_filter = False  # it would log the loss of such a step as 0
        self.bad_steps = BadSteps(args.max_bad_steps, self.accelerator, self._tokenizer)
        self.end_on_signal = EndOnSignal(self.accelerator)
        self.alarms = Alarms(args.diagnostics_warning_interval, logger.warning)
        warnings = EarlyWarnings(self.alarms, args.stop_on, self.max_completion_length)
        self.limits: list[Any] = [self.bad_steps, warnings]
        for callback in (*self.limits, self.end_on_signal):
            self.add_callback(callback)
        engine = self.vllm_generation if self.use_vllm else None
        self.reference = Reference(self.model, self.ref_model, own_reference, self.accelerator)
        refused = self._is_vlm or bool(getattr(self, "tools", None))
        self.replay_passes = replay_passes(self.model, args, refused, engine)
        for data in [] if self._is_vlm else datasets_of(given.arguments):
            columns.check_no_pictures(data)
        train_in_fp32(self.model, args)
        if is_peft_model(self.model):
            prepare_adapter(self.model, self.accelerator)
        self.eos_token_ids = settle_ends(self.model, self._tokenizer, args, self.generation_config, engine)
        if engine is None:
            pad = self._tokenizer.pad_token_id
            self.generation_kwargs.update(eos_token_id=self.eos_token_ids, pad_token_id=pad)
        columns.check_reward_names(self.reward_func_names)
        self.table = CompletionsTable(args)

        self.sampler = Sampler(args, self.accelerator, self._tokenizer)
        needs = {
            "environment=": environment is not None,
            "allowed_tokens=": allowed_tokens is not None,
            "loss_type: minirl": self._record.sampler_logps,
            f"routing_replay: {args.routing_replay}": self.replay_passes is not None,
        }
        self.samples_itself = engine is None and samples_itself(
            args, self.model, self._is_vlm, [name for name, needed in needs.items() if needed]
        )
        self.rollouts: Rollouts | None = None
        if environment is not None:
            self.mask_truncated_completions = False  # TRL looks at the last token; here the stop reason says it
            self.rollouts = Rollouts(environment, args, self.accelerator, self._tokenizer, self.num_generations)
            if args.rollout_ahead:
                sharded = self._dist.is_zero3 or self._dist.is_fsdp
                refuse_ahead(args, is_peft_model(self.model), sharded, self.train_dataset)
                self.rollouts.ahead = Ahead(plain_copy(self._base(self.model)))
        self.losses = Losses(args.max_lost_share, args.max_lost_batches) if not self.rollouts else self.rollouts.losses
        self.limits.append(RunLimits(self.losses, self.rollouts))
        self.add_callback(self.limits[-1])
        replay = None if self.replay_passes is None else self.replay_passes.replay
        self.sharing = self._add_scoring_head(self._base(self.model), replay)
        for other in filter(None, (self.ref_model, twin)):
            self._add_scoring_head(self._base(other), None)
        self.add_callback(Clock(self._begin_training, self._end_step))
        self.distiller: Distiller | None = None
        if distils and not self._is_vlm:
            words = (self._tokenizer, lambda prompts: self._tokenize_prompts(prompts)[0])
            student, metrics = (self.model, twin), self._metrics["train"]
            self.distiller = Distiller(self._record, *student, args, self.accelerator, *words, metrics)
        self.teacher = None if self.distiller is None else self.distiller.teacher
        self.loss = None if self._record.loss is None else loss_of(self)
        self.checkpoints = Checkpoints(self.accelerator, self.reference, self.distiller, self.rollouts)
        if args.disable_dropout:
            for noisy in filter(None, (self.model, self.ref_model)):
                still(noisy)
        if not self._is_vlm:
            others = [self.ref_model, None if self.teacher is None else self.teacher.model]
            models = [self._base(m) for m in (self.model, *others) if m is not None]
            self.add_callback(ForwardChecks(self.model, models, args, self.accelerator.autocast))

    def _add_scoring_head(self, base: PreTrainedModel, replay: RoutingReplay | None) -> PrefixSharing:
        mode = "off" if self._is_vlm else self.args.shared_prefix
        sharded = self.accelerator.distributed_type in ("DEEPSPEED", "FSDP")
        sharing = PrefixSharing(base, mode, sharded, replay)
        add_scoring_head(base, sharing, self.temperature)
        return sharing

    def _base(self, model: torch.nn.Module) -> PreTrainedModel:
        """The transformers model inside."""
        base = self.accelerator.unwrap_model(model)
        return base.get_base_model() if is_peft_model(base) else base

    def _add_metrics(self, training: bool, values: Mapping[str, float]) -> None:
        """TRL averages what is appended until the next log."""
        kept = self._metrics["train" if training else "eval"]
        for name, value in values.items():
            kept[name].append(float(value))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._is_vlm or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % self._generate_every == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            shared = self.sharing.attention is not None
            self._buffered_inputs = micro_batches(scored, self.args, self.accelerator, self.aux_loss_enabled, shared)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @part("scoring")
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = inputs if self._is_vlm else columns.without_pictures(inputs)
        if self.model.training:
            _, micro = self.calendar.when(self._step)
        else:
            micro, self._evaluated = self._evaluated, self._evaluated + 1
        step = self.generation_step = GenerationStep(rows, self.model.training, self.state.global_step, micro)
        own_reference = self.reference.weights is not None
        beta, self.beta = self.beta, 0.0 if own_reference else self.beta  # TRL's is the model without its adapter
        try:
            batch = super()._generate_and_score_completions(rows)
        finally:
            self.beta = beta
        if own_reference:
            score = self._get_per_token_logps_and_entropies
            batch["ref_per_token_logps"] = self.reference.logps(batch, score, self.args)
        if step.ahead and "old_per_token_logps" not in batch:
            batch["old_per_token_logps"] = self._scored_now(batch)
        step.scored = True
        if step.bad_rewards is not None:
            batch[BAD_REWARDS] = step.bad_rewards
        if "sampling_per_token_logps" in batch and "old_per_token_logps" in batch:
            self._add_metrics(step.training, batch_mismatch(batch, partial(self.accelerator.reduce, reduction="sum")))
        if step.choices is not None:
            batch["choices"] = step.choices
        if self.replay_passes is not None:
            batch |= self.replay_passes.batch(step, batch)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        if step.ahead and not self._record.sampler_logps:  # else the loss tells the two apart
            sampler, now = batch["sampling_per_token_logps"], batch["old_per_token_logps"]
            batch["old_per_token_logps"] = torch.where(mask.bool(), sampler, now)
        if step.training and self._record.credit is not None:
            self._credit(step, batch)
        branches: list[str | None] = ["grpo"] * len(rows)
        if step.training and self.distiller is not None:
            plan = self.distiller.plan(step, rewards.correct(step, self.args, self.correctness), mask)
            batch |= self.distiller.targets(batch, mask, plan, step.prompts)
            rewarded = "grpo" if self._record.rewards_others else None
            branches = ["sdpo" if z else rewarded for z in plan.distilled.tolist()]
        elif self._record.loss is not None and (step.training or self._record.branch is None):
            batch |= nothing_distilled(mask)
        self._logs["extra"]["branch"].extend(gather_object(branches))
        return batch

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, ...]:
        """With the function schemas of the environment; TRL's own `tools` are Python functions that it calls."""
        own, self.tools = self.tools, getattr(self.environment, "tools", None) or self.tools
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self.tools = own

    @part("rollout")
    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        step = self.generation_step
        if self.rollouts is None:
            output, recorder = super()._generate(prompts), None
            prompt_ids = output[0]
            if self.allowed_tokens is not None:
                found = [[tuple(some or ()) for some in self.allowed_tokens(list(ids))] for ids in output[1]]
                step.choices = masked.gathered_choices(found, self.pad_to_multiple_of, self.accelerator.device)
        else:
            prompt_ids = self._tokenize_prompts(prompts)[0]
            in_training, plain = getattr(self, "is_in_train", False), isinstance(prompts[0], str)
            ahead = self.rollouts.ahead if step.training and in_training else None
            recorder = None
            if ahead is not None and (episodes := ahead.take(prompt_ids)) is not None:
                step.ahead = True
                played = self.rollouts.played(step, prompt_ids, plain, episodes)
                self._add_metrics(True, {"rollout/ahead_wait": ahead.waited})
            else:
                turns = nullcontext() if self.replay_passes is None else self.replay_passes.turns(step)
                with turns as recorder, self._generator(recorder) as generator:
                    played = self.rollouts.play(step, prompt_ids, plain, generator, in_training)
            if ahead is not None:
                self._play_ahead(ahead)
            output = played.output
            if step.training:
                self.state.num_input_tokens_seen += played.tokens
            self._metrics["train" if step.training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]
            self._add_metrics(step.training, played.metrics)
        if (masks := output[2]) is not None:
            ours = [torch.tensor(mask) for mask in masks]
            step.trained = pad(ours, 0, "right", self.pad_to_multiple_of).to(self.accelerator.device)
        step.opened = [opened_by(self._tokenizer, ids) for ids in prompt_ids]
        if self.replay_passes is not None:
            self.replay_passes.take(step, output, recorder)
        return output

    def _play_ahead(self, ahead: Ahead) -> None:
        """Begin the next generation batch, if this run has one."""
        assert self.rollouts is not None
        if self.rollouts.stop_because is not None or self.rollouts.losses.verdict is not None:
            return
        args, every, group = self.args, self._generate_every, self.num_generations
        number = self._step // every + 1
        if number * every >= self.calendar.micro_steps(self.state.max_steps):
            return
        data, prompts = self.train_dataset, args.generation_batch_size // group
        chosen = rows_of_batch(number, len(data), prompts, bool(self.shuffle_dataset), args.seed)
        mine, start = len(self.generation_step.rows), self.accelerator.process_index * len(self.generation_step.rows)
        rows = [data[i] for i in chosen for _ in range(group)][start : start + mine]
        step = GenerationStep(columns.without_pictures(rows), True, *self.calendar.when(number * every))
        prompt_ids = self._tokenize_prompts([row["prompt"] for row in step.rows])[0]
        sampler = Sampler(args, self.accelerator, self.rollouts.tokenizer)  # the thread's own tokenizer
        generator = sampler.make_generator(ahead.policy, self.eos_token_ids, keep_tokens=ALL_TOKENS)
        play = self.rollouts.episodes(step, prompt_ids, generator, keep_loop=True, bar=False)

        def by_the_copy() -> Any:
            with self.accelerator.autocast():
                return play()

        ahead.begin(self._base(self.model), prompt_ids, by_the_copy)

    def _scored_now(self, batch: dict[str, Any]) -> Tensor:
        """Log-probs [B, T] of a generation batch under the newest weights, as TRL scores the old policy's."""
        score, size = self._get_per_token_logps_and_entropies, self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            found: Tensor = score(self.model, *sequences(batch), batch_size=size)[0]
        return found

    def _generator(self, recorder: Any) -> Any:
        """A context: the policy's generator for one batch of episodes."""
        assert self.rollouts is not None
        if not self.use_vllm:
            how: dict[str, Any] = {"recorder": recorder, "keep_tokens": ALL_TOKENS}
            return self.sampler.policy(self.model_wrapped, self._dist, self.eos_token_ids, **how)
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        return nullcontext(self.rollouts.vllm(self.vllm_generation, self.eos_token_ids))

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step, passes = self.generation_step, self.replay_passes
        if not self.samples_itself:
            recorder = None
            policy = self.accelerator.unwrap_model(self.model)
            with nullcontext() if self.use_vllm else own_settings_aside(policy):
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        else:
            allowed = None if self.allowed_tokens is None else self.allowed_tokens.after
            how: dict[str, Any] = {"allowed": allowed, "keep_tokens": None}
            sampler = partial(self.sampler.policy, self.model_wrapped, self._dist, self.eos_token_ids)
            recording = nullcontext() if passes is None else passes.sampling(step)
            with recording as recorder, sampler(recorder=recorder, **how) as generator:
                samples = self.sampler.completions(generator, step, prompt_ids)
            completion_ids = [list(sample.ids) for sample in samples]
            read = self._record.sampler_logps or self.args.routing_replay != "off"
            logprobs = [list(sample.logprobs) for sample in samples] if read and step.training else None
        if passes is not None:
            passes.sampled(step, prompt_ids, completion_ids, recorder)
        return completion_ids, logprobs

    @part("reward")
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        step = self.generation_step
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        step.opened = step.opened or [""] * len(texts)
        step.rows = inputs
        taken = {*self.reward_func_names, *columns.TABLE_COLUMNS}
        with part("world"):
            step.columns, repaired = rewards.columns_of(step, texts, self.world, taken)
        has_world = self.world is not None or self.environment is not None
        rows = rewards.rows_with_columns(inputs, step.columns, has_world)
        step.references = [row.get(REFERENCES) for row in rows]
        lost = [row.get(columns.LOST_ROW) is not None for row in rows]
        late = self.args.reward_deadline is not None
        with without_trl_warning() if any(lost) or late else nullcontext():
            scored = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        rewards_per_func = rewards.of_models(scored, self.reward_funcs)
        if has_world or late:
            gone, counted = lost_rows(step, len(texts), self.losses, counted=self.rollouts is not None)
            self._add_metrics(step.training, counted)
            # A lost rollout has no reward, whatever a reward model says of it.
            everyone = torch.tensor(gone, device=rewards_per_func.device)
            rewards_per_func = rewards_per_func.masked_fill(everyone.unsqueeze(1), torch.nan)
        rewards.extra_columns(self._pending_extra_logs, step, self._logs["extra"], len(texts))
        step.prompts = prompts  # as the policy saw them: an environment may have added its first observation
        step.completion_ids = completion_ids_list
        step.truncated = rewards.cut_short(step, {*self.eos_token_ids, self._tokenizer.pad_token_id})
        start = self.accelerator.process_index * len(prompts)
        mine = slice(start, start + len(prompts))
        rewards_per_func, step.bad_rewards = self.bad_steps.rewards(rewards_per_func, mine)
        step.rewards = rewards.summed(rewards_per_func[mine], self.reward_weights)
        self._add_metrics(step.training, gathered_metrics(step.columns, len(texts)))
        if repaired := gather_object(repaired):
            self._add_metrics(step.training, {"records/repaired": len(repaired)})
            self.table.say(f"texts of the world are no valid Unicode, and were repaired: {repaired[0]}", step.number)
        return rewards_per_func

    def _credit(self, step: GenerationStep, batch: dict[str, Any]) -> None:
        success = rewards.correct(step, self.args, self.correctness)
        batch["advantages"], everyone = credited(self._record, step, success, self.args, self.accelerator)
        logged = self._logs["advantages"]
        for _ in everyone:
            logged.pop()
        logged.extend(everyone)
        below = sum(a < 0 for a in everyone) / len(everyone)
        self._add_metrics(True, {f"{self.objective}/below_baseline": below})

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        step, passes = self.generation_step, self.replay_passes
        # A pass of a loss has what `_compute_loss` has set.
        among = nullcontext() if step.scored else self._among(model, step.choices, step.trained)
        replayed = nullcontext() if passes is None else passes.old_pass(step, model, attention_mask)
        with among, replayed:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

    def _among(self, model: torch.nn.Module, choices: Tensor | None, trained: Tensor | None) -> Any:
        """A context: passes of the model score those of their tokens that are trained on, among `choices`."""
        return masked.scored_among(self._base(model), choices, trained)

    @part("loss")
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if (passes := self.replay_passes) is not None and EXPERT_IDS in inputs:
            steps, micro = self.calendar.when(self._step)
            if passes.audit_due(steps, first=micro == 0):
                self._audit(passes.replay, inputs)
            passes.replay.arm(inputs[EXPERT_IDS])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            return self.bad_steps.loss(inputs, loss)
        return self.accelerator.reduce(loss, reduction="mean")  # of an evaluation transformers reads the first rank's

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.bad_steps.norm(norm)
        return norm

    def _audit(self, replay: RoutingReplay, inputs: dict[str, Any]) -> None:
        ids, attention, length = sequences(inputs)

        def score() -> Tensor:
            with self._among(self.model, inputs.get("choices"), inputs.get("tool_mask")):
                return self._get_per_token_logps_and_entropies(self.model, ids, attention, length)[0]

        clip = (self.epsilon_low, self.epsilon_high)
        self._add_metrics(True, audited(score, replay, inputs, clip, self.accelerator))

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self._among(model, inputs.get("choices"), inputs.get("tool_mask")):
            if self.loss is None or "distilled" not in inputs:  # TRL's own, and where there is no teacher
                return super()._compute_loss(model, inputs)
            training = self.model.training
            accumulation = self.current_gradient_accumulation_steps if training else 1
            found = self.loss(model, inputs, training, accumulation)
            if not training:
                self._add_metrics(False, self.loss.metrics())
            return found

    @part("gradient")
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            if self.replay_passes is not None:
                self.replay_passes.replay.disarm()  # only now: the backward pass may run layers again
        if self.loss is not None and self.accelerator.sync_gradients:
            self._add_metrics(True, self.loss.metrics())
            if self.teacher is not None:
                self._add_metrics(True, self.loss.gradient_share())
        return torch.where(loss.isfinite(), loss, 0.0)  # transformers adds it up, and never gets rid of a NaN

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        given = resume_from_checkpoint
        found = resume_from(given, self.args.output_dir) if given in AUTO else given
        check_start(self.train_dataset, self.args, found)
        found = resume_from(found, self.args.output_dir)
        if found is not None:
            self.checkpoints.refuse_other_run(found)
        if self.args.eval_strategy != "no" and self.heldout is None:
            check_eval_rows(self.eval_dataset, self.args, self.num_generations_eval)
        hang, wait = self.args.hang_deadline, self.args.ddp_timeout
        with heeded() as self.end_on_signal.signals, watched(hang, wait), part("training", patient=True):
            with self.end_on_signal.signals.waited_for(self.args.signal_deadline):
                try:
                    output = super().train(found, *rest, **kwargs)
                finally:
                    if self.rollouts is not None:
                        self.rollouts.close()
                for limit in self.limits:
                    limit.conclude(self.args)
                ended = self.end_on_signal.agree()
                if ended and self.checkpoints.last != self.state.global_step and not self.args.load_best_model_at_end:
                    self._save_checkpoint(self.model, None)  # asked after the last step
            if ended:
                raise Interrupted
            check_steps_made(self.state.global_step)
            self.bad_steps.check_weights(self.model)
        return output

    @part("evaluation", prefix=True)
    def evaluate(self, eval_dataset: Any = None, *rest: Any, **kwargs: Any) -> Any:
        self._wait_ahead()
        self._evaluated = 0
        if self.heldout is not None and eval_dataset is None:
            self.model.eval()  # what is logged now is no training step
            found = {f"eval_{name}": float(value) for name, value in self.heldout().items()}
            self.log(found)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, str):
            check_eval_rows(given, self.args, self.num_generations_eval)
        metrics = super().evaluate(eval_dataset, *rest, **kwargs)
        if metrics.get("eval_reward", 0.0) is None:  # of an evaluation whose rollouts were all lost: never the best
            metrics["eval_reward"] = float("nan")
        return metrics

    def _wait_ahead(self) -> None:
        if self.rollouts is not None and self.rollouts.ahead is not None:
            self.rollouts.ahead.wait()

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
        self.calendar = calendar_of(self._train_sampler, self.args)
        self._step = self.calendar.micro_steps(state.global_step)
        wind(self._train_sampler, state.global_step // self.calendar.steps)

    def _end_step(self) -> None:
        if self.teacher is not None and self._step % self._generate_every == 0 and not self.bad_steps.skipped:
            self.teacher.update()

    @part("save")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with saved_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.save_beside is not None and self.args.should_save:
            self.save_beside(Path(output_dir or self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        # Where TRL and transformers write checkpoints, and find none that they would take away in their own way.
        return os.path.join(super()._get_output_dir(trial), SAVING)

    @part("save")
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.bad_steps.check_weights(self.model)
        self._wait_ahead()
        theirs = partial(super()._save_checkpoint, model, trial)
        inside = self._step % self._generate_every != 0
        output = Path(self._get_output_dir(trial)).parent
        self.checkpoints.write(self, output, theirs, self._buffered_inputs if inside else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.checkpoints.load_experts(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.checkpoints.load_experts(self.model, self.state.best_model_checkpoint)
        self._last_loaded_step = -1  # of vLLM: these are not the weights of this step any more

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (batches := self.checkpoints.load(checkpoint)) is not None:
            self._buffered_inputs = batches

    def _log_completion_extra(self, column: str, values: Any) -> None:
        """A column that a reward function logs: checked and repaired where it comes in."""
        step, taken = self.generation_step, {*self.reward_func_names, *columns.TABLE_COLUMNS}
        taken |= {*step.columns, *self._pending_extra_logs} - {FEEDBACK}
        super()._log_completion_extra(*columns.checked_extra(column, values, len(step.rows), taken))

    def _log_metric(self, name: str, value: float) -> None:
        super()._log_metric(name, columns.checked_metric("log_metric", name, value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        ours, step = self.log_completions, self.state.global_step
        of_rollouts = ours and self.accelerator.is_main_process and (self.heldout is None or self.model.training)
        table = self.table.take(self._logs, step, logs) if of_rollouts else {}
        if "loss" in logs:
            logs |= self.bad_steps.since_logged()
        self.log_completions = False  # TRL's own part of this
        try:
            super().log(logs, start_time)  # adds the averaged metrics to `logs`
        finally:
            self.log_completions = ours
        if table:
            self.table.write(table, self._logs, step)
        if self.model.training and self.replay_passes is not None:
            numbers = {name: value for name, value in logs.items() if isinstance(value, float)}
            self.replay_passes.alarms.observe(numbers)
