"""Multi-turn rollouts in the trainer: an environment's episodes take the place of one completion per prompt.

    _generate                 rows -> `srpo.rollout.loop.play` -> completions of several owners, and what was lost
    _calculate_rewards        the episodes' columns; a lost rollout has no reward, in any function
    _generate_and_score...    choices of masked decisions become part of the batch

Failure is data. A lost rollout leaves its group: it has no reward, no token of it is trained on, and the group's mean
is that of the survivors. A group of which less than three quarters survive is dropped whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging
from trl.models.utils import unwrap_model_for_generation

from srpo.columns import LOST_ROW, checked_metric
from srpo.rollout.batch import Flat, flatten, kept_rows, most_choices, padded_choices, row_key, row_seeds
from srpo.rollout.generator import Generator, Recorder, Sampling, TransformersGenerator
from srpo.rollout.loop import Limits, as_columns, play
from srpo.rollout.sampling import text_of
from srpo.rollout.thinking import opened_by
from srpo.rollout.vllm import VLLMGenerator
from srpo.rollout.worker_loop import EpisodeLoop
from srpo.trainer.limits import RunLimits, without_trl_warning
from srpo.trainer.rollout_metrics import TRUNCATED, Account, Losses, account, rollout_metrics
from srpo.types import Columns, Environment, Trajectory

logger = logging.get_logger(__name__)


class RolloutMixin:
    """Rollouts of an environment, for `srpo.trainer.trainer.SRPOTrainer`; without one, everything is TRL's."""

    accelerator: Any
    add_callback: Any
    args: Any
    eos_token_ids: list[int]
    mask_truncated_completions: bool
    model: Any
    model_wrapped: Any
    num_generations: int
    pad_to_multiple_of: int | None
    state: Any
    use_vllm: bool
    vllm_generation: Any
    _dist: Any
    _last_loaded_step: int
    _metrics: Any
    _tokenize_prompts: Any
    _tokenizer: Any

    environment: Environment | None = None
    world: Any = None
    _choices: Tensor | None = None
    _trajectories: list[Trajectory] | None = None
    _recorder: Recorder | None = None
    _episode_loop: EpisodeLoop | None = None
    _batch_rows: Sequence[Any] = ()
    _losses: Losses
    _opened: Sequence[str] = ()
    """Per completion the think tag that its prompt has opened, or ""."""
    _stop_because: str | None = None

    def _set_up_rollouts(self, environment: Environment) -> None:
        self.environment = environment
        self._mask_truncated = self.mask_truncated_completions
        self.mask_truncated_completions = False  # TRL looks at the last token; here the stop reason says it
        self._losses = Losses(self.args.max_lost_share, self.args.max_lost_batches)
        self.add_callback(RunLimits(self))

    # ------------------------------------------------------------------------------------------------ rollouts

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self.environment is None:
            output = super()._generate(prompts)
            self._opened = [opened_by(self._tokenizer, ids) for ids in output[0]]
            return output
        training = self.model.training
        prompt_ids = self._tokenize_prompts(prompts)[0]
        self._opened = [opened_by(self._tokenizer, ids) for ids in prompt_ids]
        in_training = getattr(self, "is_in_train", False)
        if in_training and self._episode_loop is None:
            self._episode_loop = EpisodeLoop()
        with self._policy() as generator:
            trajectories = play(
                self.environment,
                self._batch_rows,
                prompt_ids,
                self._seeds(training),
                generator,
                self._tokenizer,
                self._limits(),
                self._episode_loop if in_training else None,
                progress=self.accelerator.is_main_process and not self.args.disable_tqdm,
                out_of_money=self._purse() if training else lambda: False,
            )
        self._trajectories = trajectories
        flat = [flatten(t, self._tokenizer.pad_token_id) for t in trajectories]
        kept = self._account(prompt_ids, flat, trajectories, training)
        masks = [[k * p for p in f.policy] for f, k in zip(flat, kept, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(f.ids) for f in flat) // multiple) * multiple
        rows = [f.choices for f in flat]
        # Of all ranks: a rank whose episodes were all lost scores choices too, as it gathers a sharded head in step.
        choices = padded_choices(rows, length, max(gather_object([most_choices(rows)])))
        self._choices = None if choices is None else choices.to(self.accelerator.device)
        completions = [self._messages(t, isinstance(prompts[0], str)) for t in trajectories]
        ids, logprobs = [f.ids for f in flat], [f.logprobs for f in flat]
        return prompt_ids, ids, masks, completions, logprobs, {}, None, []

    def _seeds(self, training: bool) -> list[str]:
        keys = gather_object([row_key(row) for row in self._batch_rows])
        when = f"{self.args.seed}:{'' if training else 'eval-'}{self.state.global_step}"
        start = self.accelerator.process_index * len(self._batch_rows)
        return row_seeds(keys, when)[start : start + len(self._batch_rows)]

    def _limits(self) -> Limits:
        args = self.args
        return Limits(
            turns=args.max_turns,
            tokens=args.max_completion_length,
            observation_tokens=args.max_observation_tokens,
            step_seconds=args.step_deadline,
            turn_tokens=args.max_turn_tokens,
            episode_seconds=args.episode_deadline,
        )

    def _sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            stop=tuple(args.stop_strings),
        )

    @contextmanager
    def _policy(self) -> Iterator[Generator]:
        """The generator of one generation batch, on the current weights."""
        if self.use_vllm:
            if self.state.global_step != self._last_loaded_step:
                self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            yield VLLMGenerator(self.vllm_generation, self._tokenizer, self._sampling(), eos_ids=self.eos_token_ids)
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            _out_of_step(self.model_wrapped) if self._gathered else nullcontext(),
        ):
            training = model.training
            model.eval()  # dropout would draw from the run's random state, in the order of the batch
            try:
                yield self._make_generator(model)
            finally:
                model.train(training)

    def _make_generator(self, model: Any) -> Generator:
        sharded = (self._dist.is_zero3 or self._dist.is_fsdp) and not self._gathered
        return TransformersGenerator(
            model,
            self._tokenizer,
            self._sampling(),
            eos_ids=self.eos_token_ids,
            recorder=self._recorder,
            any_busy=self._any_busy if sharded else None,
        )

    @property
    def _gathered(self) -> bool:
        """Whether every process generates with whole parameters that ZeRO-3 has sharded."""
        return bool(self._dist.is_zero3 and self.args.ds3_gather_for_generation)

    def _any_busy(self, busy: bool) -> bool:
        flag = torch.tensor([float(busy)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)

    def _messages(self, trajectory: Trajectory, plain: bool) -> Any:
        """What reward functions and the completions table get: messages with their owners, or the policy's text."""
        text = partial(text_of, self._tokenizer)
        if plain:
            return "".join(text(turn.ids) for turn in trajectory.turns if turn.owner == "policy")
        roles = {"policy": "assistant", "world": "tool"}
        messages = [{"role": roles[turn.owner], "content": text(turn.ids)} for turn in trajectory.turns]
        return messages or [{"role": "assistant", "content": ""}]

    # ------------------------------------------------------------------------------------- failures and metrics

    def _account(
        self, prompt_ids: list[Any], flat: list[Flat], trajectories: list[Trajectory], training: bool
    ) -> list[bool]:
        """Log the batch of all ranks; which local rows are trained on."""
        mine = [account(len(ids), sum(f.policy), t) for ids, f, t in zip(prompt_ids, flat, trajectories, strict=True)]
        everyone = gather_object(mine)
        lost = [row.stop == "lost" for row in everyone]
        kept = kept_rows(lost, self.num_generations if training else 1)
        if training:
            if (summary := self._losses.observe(everyone)) is not None:
                logger.warning("%s", summary)
            self.state.num_input_tokens_seen += sum(row.prompt_tokens + row.policy_tokens for row in everyone)
        self._log_rollouts(everyone, kept, training)
        if self._mask_truncated:
            kept = [k and row.stop not in TRUNCATED for k, row in zip(kept, everyone, strict=True)]
        start = self.accelerator.process_index * len(mine)
        return kept[start : start + len(mine)]

    def _log_rollouts(self, rows: list[Account], kept: list[bool], training: bool) -> None:
        values = rollout_metrics(rows, kept)
        own = self.environment.metrics()  # type: ignore[union-attr]
        mine = {name: checked_metric("the environment's metrics", name, value) for name, value in own.items()}
        found = gather_object([mine])
        for name in sorted({name for f in found for name in f}):
            numbers = [f[name] for f in found if name in f]
            values[name] = sum(numbers) / len(numbers)
        values["cost/spent_usd"] = spent = self._spent()
        metrics = self._metrics["train" if training else "eval"]
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in values.items():
            metrics[name].append(float(value))
        ceiling = self.args.max_cost_usd
        if ceiling is not None and spent >= ceiling:
            self._stop_because = f"${spent:.4f} are spent, max_cost_usd is {ceiling:g}: this step is the last"

    def _purse(self) -> Callable[[], bool]:
        """Whether the run's money is spent, by what this rank knows: all ranks' before the batch, its own since."""
        ceiling, environment = self.args.max_cost_usd, self.environment
        if ceiling is None or environment is None:
            return lambda: False
        left = ceiling - self._spent() + environment.spent_usd()
        return lambda: environment.spent_usd() >= left

    def _spent(self) -> float:
        return sum(gather_object([float(self.environment.spent_usd())]))  # type: ignore[union-attr]

    # ------------------------------------------------------------------------------------------------- scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.environment is None:
            return super()._generate_and_score_completions(inputs)
        self._batch_rows = inputs
        try:
            batch = super()._generate_and_score_completions(inputs)
            if self._choices is not None:
                batch["choices"] = self._choices
            return batch
        finally:
            self._batch_rows, self._choices, self._trajectories = (), None, None

    def _world_columns(self, inputs: list[dict[str, Any]], texts: Sequence[str]) -> Columns:
        if self._trajectories is not None:
            return as_columns(self._trajectories)
        return {} if self.world is None else self.world(inputs, texts)

    def _cut_short(self, completion_ids: Sequence[Any]) -> list[bool]:
        """Which completions a limit ended; they are nobody's demonstration."""
        if self._trajectories is not None:
            return [t.stop in TRUNCATED for t in self._trajectories]
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return [not len(ids) or int(ids[-1]) not in ends for ids in completion_ids]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        """[all rows, functions]; a lost rollout has no reward, whatever a reward model says of it."""
        if self.environment is None and self.world is None:
            return super()._calculate_rewards(inputs, *args, **kwargs)
        lost = [row[LOST_ROW] is not None for row in inputs]
        with without_trl_warning() if any(lost) else nullcontext():
            rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        everyone = torch.tensor(gather_object(lost), device=rewards.device)
        return rewards.masked_fill(everyone.unsqueeze(1), torch.nan)


@contextmanager
def _out_of_step(engine: Any) -> Iterator[None]:
    """Processes may take different numbers of forwards, or none, of parameters that ZeRO-3 has gathered.

    TRL takes DeepSpeed's hooks off the gathered model, all but one: at the start of a forward it compares across
    processes in which order modules were used. A process without that forward would be waited for without end.
    """
    optimizer = getattr(engine, "optimizer", None)  # before the first training step: none, or the offload itself
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if offload is None:
        yield
        return
    offload.param_coordinator.reset_step = lambda: None
    try:
        yield
    finally:
        del offload.param_coordinator.reset_step
