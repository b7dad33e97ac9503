"""Multi-turn rollouts in the trainer: an environment's episodes take the place of one completion per prompt.

    _generate                 rows -> `srpo.rollout.play` -> completions of several owners, and what was lost
    _calculate_rewards        the episodes' columns; a lost rollout has no reward, in any function
    _generate_and_score...    choices of masked decisions become part of the batch

Failure is data. A lost rollout leaves its group: it has no reward, no token of it is trained on, and the group's mean
is that of the survivors. A group of which less than three quarters survive is dropped whole.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging
from trl.models.utils import unwrap_model_for_generation

from srpo.episode_loop import EpisodeLoop
from srpo.generate import Generator, Recorder, Sampling, TransformersGenerator
from srpo.rollout import TURNS, Limits, as_columns, play
from srpo.types import LOST, ROUTE, STOPS, Columns, Environment, Trajectory

logger = logging.get_logger(__name__)

MIN_SURVIVORS = 0.75
TRUNCATED = ("turns", "tokens", "deadline")
"""Stops that cut a trajectory short. "budget" is the world's own ruling, as final as "done"."""


@dataclass(frozen=True)
class Flat:
    """A trajectory as TRL takes it: one completion with an owner per token."""

    ids: list[int]
    policy: list[int]
    """1 where the policy wrote the token."""
    logprobs: list[float]
    """0 where the world did."""
    choices: list[tuple[int, ...]]
    """Allowed ids, () where there was no restriction."""


def flatten(trajectory: Trajectory, pad_id: int) -> Flat:
    """All turns in one row. A trajectory without a token becomes one padding token of the world's."""
    flat = Flat([], [], [], [])
    for turn in trajectory.turns:
        n = len(turn.ids)
        ours = turn.owner == "policy"
        flat.ids.extend(turn.ids)
        flat.policy.extend([int(ours)] * n)
        flat.logprobs.extend(turn.logprobs if turn.logprobs is not None else [0.0] * n)
        flat.choices.extend([turn.choices or ()] * n)
    return flat if flat.ids else Flat([pad_id], [0], [0.0], [()])


def padded_choices(rows: Sequence[Sequence[tuple[int, ...]]], length: int) -> Tensor | None:
    """[B, T, A] int64, padded with -1, of each token's allowed ids; None if no token was restricted."""
    widest = max((len(allowed) for row in rows for allowed in row), default=0)
    if not widest:
        return None
    table = torch.full((len(rows), length, widest), -1)
    for b, row in enumerate(rows):
        for t, allowed in enumerate(row):
            if allowed:
                table[b, t, : len(allowed)] = torch.tensor(allowed)
    return table


def kept_rows(lost: Sequence[bool], group: int) -> list[bool]:
    """Which rows are trained on: not lost, and in a group (consecutive rows) of which enough survive."""
    kept = []
    for start in range(0, len(lost), group):
        members = lost[start : start + group]
        enough = members.count(False) >= MIN_SURVIVORS * len(members)
        kept.extend(enough and not gone for gone in members)
    return kept


def row_seeds(keys: Sequence[str], prefix: str) -> list[str]:
    """`prefix:key:n`, n the number of equal keys before: named by what a row is, not by where it stands."""
    seen: Counter[str] = Counter()
    seeds = []
    for key in keys:
        seeds.append(f"{prefix}:{key}:{seen[key]}")
        seen[key] += 1
    return seeds


def row_key(row: Any) -> str:
    """A dataset row's own name: its `query_id`, or a digest of its prompt."""
    if row.get("query_id") is not None:
        return str(row["query_id"])
    return hashlib.sha256(json.dumps(row["prompt"], sort_keys=True, default=str).encode()).hexdigest()[:16]


class LostRollouts(RuntimeError):
    """Too many rollouts were lost; a checkpoint has been saved."""


class RolloutMixin:
    """Rollouts of an environment, for `srpo.trainer.SRPOTrainer`; without one, everything is TRL's."""

    accelerator: Any
    args: Any
    model: Any
    state: Any
    _metrics: Any
    _tokenizer: Any

    environment: Environment | None = None
    world: Any = None
    _choices: Tensor | None = None
    _trajectories: list[Trajectory] | None = None
    _recorder: Recorder | None = None
    _episode_loop: EpisodeLoop | None = None
    _batch_rows: Sequence[Any] = ()
    _lost_rows: Tensor | None = None
    _lost_batches: int = 0
    _stop_because: str | None = None
    _lost_summary: str | None = None

    def _set_up_rollouts(self, environment: Environment) -> None:
        self.environment = environment
        self._mask_truncated = self.mask_truncated_completions
        self.mask_truncated_completions = False  # TRL looks at the last token; here the stop reason says it
        self.add_callback(RunLimits(self))

    # ------------------------------------------------------------------------------------------------ rollouts

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self.environment is None:
            return super()._generate(prompts)
        training = self.model.training
        prompt_ids = self._tokenize_prompts(prompts)[0]
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
            )
        self._trajectories = trajectories
        flat = [flatten(t, self._tokenizer.pad_token_id) for t in trajectories]
        kept = self._account(prompt_ids, flat, trajectories, training)
        masks = [[k * p for p in f.policy] for f, k in zip(flat, kept, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(f.ids) for f in flat) // multiple) * multiple
        choices = padded_choices([f.choices for f in flat], length)
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
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            training = model.training
            model.eval()  # dropout would draw from the run's random state, in the order of the batch
            try:
                yield self._make_generator(model)
            finally:
                model.train(training)

    def _make_generator(self, model: Any) -> Generator:
        gathered = self._dist.is_zero3 and self.args.ds3_gather_for_generation
        sharded = (self._dist.is_zero3 or self._dist.is_fsdp) and not gathered
        return TransformersGenerator(
            model,
            self._tokenizer,
            self._sampling(),
            eos_ids=self.eos_token_ids,
            recorder=self._recorder,
            any_busy=self._any_busy if sharded else None,
        )

    def _any_busy(self, busy: bool) -> bool:
        flag = torch.tensor([float(busy)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)

    def _messages(self, trajectory: Trajectory, plain: bool) -> Any:
        """What reward functions and the completions table get: messages with their owners, or the policy's text."""

        def text(ids: Sequence[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
        mine = [
            {
                "prompt": len(ids),
                "policy": sum(f.policy),
                "stop": t.stop,
                "turns": t.columns[TURNS],
                "cause": None if t.stop != "lost" else _cause(t),
            }
            for ids, f, t in zip(prompt_ids, flat, trajectories, strict=True)
        ]
        everyone = gather_object(mine)
        lost = [row["stop"] == "lost" for row in everyone]
        self._lost_rows = torch.tensor(lost, device=self.accelerator.device)
        group = self.num_generations if training else 1
        kept = kept_rows(lost, group)
        if training:
            self._watch_losses(everyone)
            self.state.num_input_tokens_seen += sum(row["prompt"] + row["policy"] for row in everyone)
        self._log_rollouts(everyone, kept, training)
        if self._mask_truncated:
            kept = [k and row["stop"] not in TRUNCATED for k, row in zip(kept, everyone, strict=True)]
        start = self.accelerator.process_index * len(mine)
        return kept[start : start + len(mine)]

    def _log_rollouts(self, rows: list[dict[str, Any]], kept: list[bool], training: bool) -> None:
        metrics = self._metrics["train" if training else "eval"]
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        n = len(rows)
        lengths = [row["policy"] for row in rows]
        whole = [row["policy"] for row in rows if row["stop"] not in (*TRUNCATED, "lost")] or [0]
        values = {  # the names up to here are TRL's; lengths count the policy's tokens
            "completions/mean_length": sum(lengths) / n,
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": sum(row["stop"] in TRUNCATED for row in rows) / n,
            "completions/mean_terminated_length": sum(whole) / len(whole),
            "completions/min_terminated_length": min(whole),
            "completions/max_terminated_length": max(whole),
            "rollout/turns": sum(row["turns"] for row in rows) / n,
            "rollout/dropped_share": 1 - sum(kept) / n,
            **{f"rollout/stop/{stop}": sum(row["stop"] == stop for row in rows) / n for stop in STOPS},
        }
        found = gather_object([dict(self.environment.metrics())])  # type: ignore[union-attr]
        for name in sorted({name for f in found for name in f}):
            numbers = [f[name] for f in found if name in f]
            values[name] = sum(numbers) / len(numbers)
        values["cost/spent_usd"] = self._spent()
        for name, value in values.items():
            metrics[name].append(float(value))
        ceiling = self.args.max_cost_usd
        if ceiling is not None and values["cost/spent_usd"] >= ceiling and self._stop_because is None:
            self._stop_because = (
                f"${values['cost/spent_usd']:.4f} are spent, max_cost_usd is {ceiling:g}: this step is the last"
            )

    def _spent(self) -> float:
        return sum(gather_object([float(self.environment.spent_usd())]))  # type: ignore[union-attr]

    def _watch_losses(self, rows: list[dict[str, Any]]) -> None:
        causes = Counter(row["cause"] for row in rows if row["stop"] == "lost")
        lost = sum(causes.values())
        if not lost:
            self._lost_batches = 0
            return
        most = "; ".join(f"{n} x {cause}" for cause, n in causes.most_common(3))
        summary = f"{lost} of {len(rows)} rollouts of the batch were lost: {most}"
        logger.warning("%s", summary)
        self._lost_batches = self._lost_batches + 1 if lost > self.args.max_lost_share * len(rows) else 0
        if self._lost_batches >= self.args.max_lost_batches and self._lost_summary is None:
            self._lost_summary = (
                f"more than {self.args.max_lost_share:.0%} of the rollouts were lost in {self._lost_batches} batches "
                f"in a row; the last: {summary}"
            )

    # ------------------------------------------------------------------------------------------------- scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.environment is None:
            return super()._generate_and_score_completions(inputs)
        self._batch_rows = inputs
        try:
            batch = super()._generate_and_score_completions(inputs)
            if self._choices is not None:
                batch["choices"] = self._choices
            batch["num_items_in_batch"] = batch["num_items_in_batch"].clamp(min=1)  # all lost: a loss of 0, not 0/0
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

    def _without_lost(self, rewards_per_func: Tensor) -> Tensor:
        """[all rows, functions]: a lost rollout has no reward."""
        if self._trajectories is None or self._lost_rows is None:
            return rewards_per_func
        return rewards_per_func.masked_fill(self._lost_rows.unsqueeze(1), torch.nan)


def refuse_other_rollouts(args: Any, given: Mapping[str, Any], world: Any) -> None:
    """ValueError for arguments that an environment excludes."""
    others = {"world": world} | {name: given.get(name) for name in ("rollout_func", "tools", "environment_factory")}
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"environment= and {name}= both say what happens to a completion; give one of them")
    if args.use_transformers_continuous_batching:
        raise ValueError("use_transformers_continuous_batching has no meaning with environment=; leave it False")
    if args.generation_kwargs and not args.use_vllm:
        names = ", ".join(args.generation_kwargs)
        raise ValueError(f"generation_kwargs ({names}) are not read with environment=; set the fields of the config")


class RunLimits(TrainerCallback):
    """Stops a run that has spent its money or loses its rollouts, with a checkpoint; ends the episodes' thread."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reason = self.trainer._lost_summary or self.trainer._stop_because
        if reason is not None and not control.should_training_stop:
            logger.warning("The run stops, with a checkpoint: %s", reason)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._episode_loop is not None:
            self.trainer._episode_loop.close()
            self.trainer._episode_loop = None
        if self.trainer._lost_summary is not None:
            raise LostRollouts(f"{self.trainer._lost_summary}. A checkpoint was saved in {args.output_dir}")


def _cause(trajectory: Trajectory) -> str:
    member = trajectory.columns.get(ROUTE)
    cause = str(trajectory.columns.get(LOST) or "no reason given")
    return cause if member is None or str(member) in cause else f"{member}: {cause}"
