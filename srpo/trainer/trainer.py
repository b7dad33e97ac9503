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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from srpo import columns
from srpo.hub.hub import HubMixin
from srpo.objectives import objective_of
from srpo.replay.passes import EXPERT_IDS, engine_that_replay_needs, replay_passes
from srpo.rollout.sampler_logprobs import batch_mismatch, settle_ends
from srpo.rollout.sampling_rules import own_settings_aside
from srpo.rollout.turns import ALL_TOKENS
from srpo.rollout.vllm_settings import vllm_of
from srpo.run.signals import Interrupted, heeded
from srpo.run.steps import check_eval_rows, check_steps_made
from srpo.run.watch import part, watched
from srpo.run.whole import SAVING
from srpo.teacher import masked_decisions as masked
from srpo.texts import opened_by
from srpo.trainer import parts, rewards
from srpo.trainer.adapters import prepare_adapter
from srpo.trainer.arguments import checked_config, datasets_of, refuse_contradictions
from srpo.trainer.bad_numbers import BAD_REWARDS, BadSteps
from srpo.trainer.checkpoint import Checkpoints, StartIsCandidate
from srpo.trainer.clock import Clock
from srpo.trainer.distiller import nothing_distilled
from srpo.trainer.engines import saved_whole, sealed
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.late import world_one_by_one
from srpo.trainer.limits import EarlyWarnings, EndOnSignal, RunLimits
from srpo.trainer.loss import loss_of, sequences
from srpo.trainer.metrics import Alarms, CompletionsTable, Losses
from srpo.trainer.micro_batches import micro_batches
from srpo.trainer.overlap import old_policy_sampled
from srpo.trainer.precision import train_in_fp32
from srpo.trainer.reference import Reference, reference_of
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
        self.world, self.environment = world_one_by_one(world, args.world_deadline), environment
        self.correctness, self.allowed_tokens, self.heldout = correctness, allowed_tokens, heldout
        self.generation_step = GenerationStep(scored=True)  # a resumed run may begin inside of one
        self.clock = Clock(self, args)

        # `rest` are TRL's further arguments by position.
        given = inspect.signature(TRLGRPOTrainer).bind(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        peft_config = given.arguments.get("peft_config")
        twin = parts.twin_of(model, args, peft_config, self._record.distils(args))
        refuse_contradictions(args, given.arguments, world, environment, allowed_tokens)

        with (
            vllm_of(self, args),
            engine_that_replay_needs(args),
            reference_of(model, peft_config, args) as own_reference,
            parts.evaluates_by(heldout, args),
        ):
            functions = rewards.checked_rewards(
                reward_funcs,
                lambda words: self.bad_steps.reward(words),
                args.reward_deadline,
                lambda causes: self.generation_step.lose(causes),
            )
            super().__init__(model, functions, args, train_dataset, *rest, **kwargs)
        self.beta = args.beta
        self.args.logging_nan_inf_filter = False  # it would log the loss of such a step as 0
        self.bad_steps = BadSteps(args.max_bad_steps, self.accelerator, self._tokenizer)
        self.end_on_signal = EndOnSignal(self.accelerator)
        self.alarms = Alarms(args.diagnostics_warning_interval, logger.warning)
        engine = self.vllm_generation if self.use_vllm else None
        self.reference = Reference(self.model, self.ref_model, own_reference, self.accelerator)
        self.replay_passes = replay_passes(
            self.model, args, self._is_vlm or bool(getattr(self, "tools", None)), engine
        )
        for data in [] if self._is_vlm else datasets_of(given.arguments):
            columns.check_no_pictures(data)
        train_in_fp32(self.model, args)
        if is_peft_model(self.model):
            prepare_adapter(self.model, self.accelerator)
        self.eos_token_ids = settle_ends(self, engine)
        columns.check_reward_names(self.reward_func_names)
        self.table = CompletionsTable(args)

        self.sampler = Sampler(args, self.accelerator, self._tokenizer)
        self.samples_itself = parts.our_generator_samples(self)
        self.rollouts = parts.rollouts_of(environment, self)
        if environment is not None:
            self.mask_truncated_completions = False  # TRL looks at the last token; here the stop reason says it
        self.losses = Losses(args.max_lost_share, args.max_lost_batches) if not self.rollouts else self.rollouts.losses
        self.sharing = parts.share_prefixes(self, twin)
        warnings = EarlyWarnings(self.alarms, args.stop_on, self.max_completion_length)
        money = RunLimits(self.losses, self.rollouts)
        self.limits: list[Any] = [self.bad_steps, warnings, money]
        for callback in (self.bad_steps, warnings, self.end_on_signal, money, self.clock, StartIsCandidate(self)):
            self.add_callback(callback)
        self.distiller = parts.distiller_of(self, twin)
        self.teacher = None if self.distiller is None else self.distiller.teacher
        self.loss = None if self._record.loss is None else loss_of(self)
        kept = (self.losses, self.bad_steps, self.table, self.accelerator, self._add_metrics)
        self.scoring = rewards.Scoring(self.world, *kept, environment is not None, args.reward_deadline is not None)
        self.checkpoints = Checkpoints(self.accelerator, self.reference, self.distiller, self.rollouts)
        if (checks := parts.forward_checks_of(self)) is not None:
            self.add_callback(checks)

    def _add_metrics(self, training: bool, values: Mapping[str, float]) -> None:
        """TRL averages what is appended until the next log."""
        kept = self._metrics["train" if training else "eval"]
        for name, value in values.items():
            kept[name].append(float(value))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._is_vlm or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self.clock.between_batches or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            shared = self.sharing.attention is not None
            self._buffered_inputs = micro_batches(scored, self.args, self.accelerator, self.aux_loss_enabled, shared)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @part("scoring")
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = inputs if self._is_vlm else columns.without_pictures(inputs)
        micro = self.clock.part(self.model.training)
        step = self.generation_step = GenerationStep(rows, self.model.training, self.state.global_step, micro)
        with self.reference.in_place_of_trls(self):
            batch = super()._generate_and_score_completions(rows)
        batch |= self.reference.logps(batch, self._get_per_token_logps_and_entropies, self.args)
        if step.ahead and "old_per_token_logps" not in batch:
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                score, size = self._get_per_token_logps_and_entropies, self.args.per_device_train_batch_size
                batch["old_per_token_logps"] = score(self.model, *sequences(batch), batch_size=size)[0]
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
            batch["old_per_token_logps"] = old_policy_sampled(batch, mask)
        correct = rewards.correct(step, self.args, self.correctness) if step.training else None
        if correct is not None and (self._record.credit or step.importance is not None):
            logged = self._metrics["train"], self._logs
            batch["advantages"] = rewards.credited(self._record, step, correct, self.args, self.accelerator, logged)
        branches: list[str | None] = ["grpo"] * len(rows)
        if correct is not None and self.distiller is not None:
            targets, branches = self.distiller.batch(step, batch, correct, mask)
            batch |= targets
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
            output = super()._generate(prompts)
            if self.allowed_tokens is not None:
                found = [[tuple(some or ()) for some in self.allowed_tokens(list(ids))] for ids in output[1]]
                step.choices = masked.gathered_choices(found, self.pad_to_multiple_of, self.accelerator.device)
        else:
            prompt_ids = self._tokenize_prompts(prompts)[0]
            in_training, plain = getattr(self, "is_in_train", False), isinstance(prompts[0], str)
            generator = partial(self._generator, step)
            played = self.rollouts.batch(step, prompt_ids, plain, generator, keep_loop=in_training)
            if step.training and in_training and self.rollouts.ahead is not None:
                self._play_ahead(len(prompts))
            output = played.output
            if step.training:
                self.state.num_input_tokens_seen += played.tokens
            self._metrics["train" if step.training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]
            self._add_metrics(step.training, played.metrics)
        if (masks := output[2]) is not None:
            ours = [torch.tensor(mask) for mask in masks]
            step.trained = pad(ours, 0, "right", self.pad_to_multiple_of).to(self.accelerator.device)
        step.opened = [opened_by(self._tokenizer, ids) for ids in output[0]]
        if self.replay_passes is not None:
            self.replay_passes.take(step, output)
        return output

    def _play_ahead(self, mine: int) -> None:
        """Begin the next generation batch, `mine` rows of it here, if this run has one."""
        assert self.rollouts is not None
        if self.rollouts.ended or (coming := self.clock.next_batch(self.state.max_steps)) is None:
            return
        step = self.rollouts.step_ahead(*coming, mine, self.train_dataset, bool(self.shuffle_dataset))
        prompt_ids = self._tokenize_prompts([row["prompt"] for row in step.rows])[0]
        self.rollouts.begin_ahead(parts.base_of(self, self.model), step, prompt_ids, self.eos_token_ids)

    @contextmanager
    def _generator(self, step: GenerationStep) -> Iterator[Any]:
        """The policy's generator for one batch of episodes."""
        assert self.rollouts is not None
        if self.use_vllm and self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        with nullcontext() if self.replay_passes is None else self.replay_passes.turns(step):
            if self.use_vllm:
                yield self.rollouts.vllm(self.vllm_generation, self.eos_token_ids)
                return
            with self._sampler(recorder=step.recorder, keep_tokens=ALL_TOKENS) as generator:
                yield generator

    def _sampler(self, **how: Any) -> Any:
        return self.sampler.policy(self.model_wrapped, self._dist, self.eos_token_ids, **how)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        step, passes = self.generation_step, self.replay_passes
        if not self.samples_itself:
            policy = self.accelerator.unwrap_model(self.model)
            with nullcontext() if self.use_vllm else own_settings_aside(policy):
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        else:
            allowed = None if self.allowed_tokens is None else self.allowed_tokens.state()
            with (
                nullcontext() if passes is None else passes.sampling(step),
                self._sampler(recorder=step.recorder, allowed=allowed, keep_tokens=None) as generator,
            ):
                samples = self.sampler.completions(generator, step, prompt_ids, self.allowed_tokens)
            completion_ids = [list(sample.ids) for sample in samples]
            read = self._record.sampler_logps or self.args.routing_replay != "off"
            logprobs = [list(sample.logprobs) for sample in samples] if read and step.training else None
        if passes is not None:
            passes.sampled(step, prompt_ids, completion_ids)
        return completion_ids, logprobs

    @part("reward")
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        step, taken = self.generation_step, {*self.reward_func_names, *columns.TABLE_COLUMNS}
        step.prompts, step.completion_ids = prompts, completion_ids_list  # an environment may have added to a prompt
        rows = self.scoring.rows(step, inputs, completions, taken)
        with self.scoring.quiet(rows):
            scored = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        settled = self.scoring.settled(step, scored, self.reward_funcs, self.reward_weights, ends)
        rewards.extra_columns(self._pending_extra_logs, step, self._logs["extra"], len(rows))
        return settled

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
        return masked.scored_among(parts.base_of(self, model), choices, trained)

    @part("loss")
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.replay_passes is not None and EXPERT_IDS in inputs:
            clip, score = (self.epsilon_low, self.epsilon_high), partial(self._rescored, inputs)
            numbers = self.replay_passes.arm(inputs, self.clock.now, score, clip, self.accelerator)
            self._add_metrics(True, numbers)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            return self.bad_steps.loss(inputs, loss)
        return self.accelerator.reduce(loss, reduction="mean")  # of an evaluation transformers reads the first rank's

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.bad_steps.norm(norm)
        return norm

    def _rescored(self, inputs: dict[str, Any]) -> Tensor:
        """Log-probs [B, T] of a micro-batch under the weights of now."""
        with self._among(self.model, inputs.get("choices"), inputs.get("tool_mask")):
            logps: Tensor = self._get_per_token_logps_and_entropies(self.model, *sequences(inputs))[0]
        return logps

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
        found = self.checkpoints.to_resume(resume_from_checkpoint, self.args, self.train_dataset)
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
        if self.rollouts is not None:
            self.rollouts.wait()
        self.clock.evaluated = 0
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

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self.clock.sampler = super()._get_train_sampler(dataset)
        return self.clock.sampler

    @part("save")
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with saved_whole(self.accelerator), sealed(output_dir or self.args.output_dir, self.args.should_save):
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
        if self.rollouts is not None:
            self.rollouts.wait()
        theirs = partial(super()._save_checkpoint, model, trial)
        inside = not self.clock.between_batches
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
        with self.table.in_place_of_trls(self, logs):
            if "loss" in logs:
                logs |= self.bad_steps.since_logged()
            super().log(logs, start_time)  # adds the averaged metrics to `logs`
        if self.model.training and self.replay_passes is not None:
            numbers = {name: value for name, value in logs.items() if isinstance(value, float)}
            self.replay_passes.alarms.observe(numbers)
