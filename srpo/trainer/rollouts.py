"""Multi-turn rollouts in the trainer: an environment's episodes take the place of one completion per prompt.

    _generate                 rows -> `srpo.rollout.loop.play` -> completions of several owners, and what was lost
    _calculate_rewards        the episodes' columns; a lost rollout has no reward, in any function
    _generate_and_score...    choices of masked decisions become part of the batch

Failure is data. A lost rollout leaves its group: it has no reward, no token of it is trained on, and the group's mean
is that of the survivors. A group of which less than three quarters survive is dropped whole.
"""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from srpo.columns import checked_metric, without_pictures
from srpo.losses import note
from srpo.rollout.batch import flatten, kept_rows, row_key, row_seeds
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.turns import ALL_TOKENS
from srpo.rollout.vllm import VLLMGenerator
from srpo.rollout.worker_loop import EpisodeLoop
from srpo.run.watch import beat
from srpo.teacher.masked_decisions import gathered_choices
from srpo.texts import reader
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.metrics import TRUNCATED, Account, Losses, account, rollout_metrics
from srpo.trainer.overlap import Ahead, rows_of_batch
from srpo.trainer.sampler import Sampler, sampling_of
from srpo.types import Environment, Trajectory

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Played:
    """One generation batch of episodes."""

    output: tuple[Any, ...]
    """What TRL's `_generate` returns."""
    tokens: int
    """Of prompts and policy, over all ranks."""
    metrics: dict[str, float]


class Rollouts:
    """Plays the episodes of an environment, counts what is lost and what it costs.

    Args:
        environment: as in `srpo.types`.
        args: the configuration.
        tokenizer: of the policy.
        group: rollouts of one prompt, in training.

    Attributes:
        losses: of batches in a row.
        ahead: plays the next batch while this one trains; None: nothing does.
        stop_because: why the run has to stop, in words, once its money is spent.
    """

    def __init__(
        self, environment: Environment, args: Any, accelerator: Accelerator, tokenizer: Any, group: int
    ) -> None:
        self.environment, self.args, self.accelerator = environment, args, accelerator
        # Steps run while the policy writes, and an environment may encode with the trainer's: a fast tokenizer keeps
        # settings of its last call, which must not be those of another thread's.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.group = group
        self.losses = Losses(args.max_lost_share, args.max_lost_batches)
        self.stop_because: str | None = None
        self.ahead: Ahead | None = None
        self._loop: EpisodeLoop | None = None

    def close(self) -> None:
        """End the episodes' thread, and what is played ahead."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        if self.ahead is not None:
            self.ahead.drop()

    def wait(self) -> None:
        """Until nothing is played ahead."""
        if self.ahead is not None:
            self.ahead.wait()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"environment": self.environment.state_dict(), "lost_batches": self.losses.streak}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""
        self.environment.load_state_dict(state["environment"])
        self.losses.streak = state["lost_batches"]

    # ------------------------------------------------------------------------------------------------ rollouts

    def batch(
        self,
        step: GenerationStep,
        prompt_ids: list[Any],
        plain: bool,
        generator: Callable[[], AbstractContextManager[TransformersGenerator | VLLMGenerator]],
        keep_loop: bool,
    ) -> Played:
        """One generation batch: as it was played ahead, or `play`ed now by what `generator()` gives."""
        ahead = self.ahead if step.training and keep_loop else None
        if ahead is None or (episodes := ahead.take(prompt_ids)) is None:
            with generator() as one:
                return self.play(step, prompt_ids, plain, one, keep_loop)
        step.ahead = True
        played = self.played(step, prompt_ids, plain, episodes)
        played.metrics["rollout/ahead_wait"] = ahead.waited
        return played

    def step_ahead(self, number: int, when: tuple[int, int], mine: int, dataset: Any, shuffle: bool) -> GenerationStep:
        """The generation batch `number` of the run, with its rows.

        Args:
            when: optimiser steps made before it, and micro-steps of the next one.
            mine: rows of this rank.
        """
        prompts, start = self.args.generation_batch_size // self.group, self.accelerator.process_index * mine
        chosen = rows_of_batch(number, len(dataset), prompts, shuffle, self.args.seed)
        rows = [dataset[i] for i in chosen for _ in range(self.group)][start : start + mine]
        return GenerationStep(without_pictures(rows), True, *when)

    def begin_ahead(self, policy: Any, step: GenerationStep, prompt_ids: list[Any], eos_ids: list[int]) -> None:
        """Begin to play the next generation batch with the weights that the base model `policy` has now."""
        assert self.ahead is not None
        sampler = Sampler(self.args, self.accelerator, self.tokenizer)  # the thread's own tokenizer
        generator = sampler.make_generator(self.ahead.policy, eos_ids, keep_tokens=ALL_TOKENS)
        play = self.episodes(step, prompt_ids, generator, keep_loop=True, bar=False)

        def by_the_copy() -> list[Trajectory]:
            with self.accelerator.autocast():
                return play()

        self.ahead.begin(policy, prompt_ids, by_the_copy)

    @property
    def ended(self) -> bool:
        """Whether money or lost rollouts end the run with this step."""
        return self.stop_because is not None or self.losses.verdict is not None

    def play(
        self,
        step: GenerationStep,
        prompt_ids: list[Any],
        plain: bool,
        generator: TransformersGenerator | VLLMGenerator,
        keep_loop: bool,
    ) -> Played:
        """Play one generation batch; `step` gets its trajectories and choices.

        Args:
            prompt_ids: of this rank, one per row of `step`.
            plain: prompts are texts, not messages.
            keep_loop: the episodes' thread lives until `close`; else it ends with this batch.
        """
        return self.played(step, prompt_ids, plain, self.episodes(step, prompt_ids, generator, keep_loop)())

    def episodes(
        self,
        step: GenerationStep,
        prompt_ids: list[Any],
        generator: TransformersGenerator | VLLMGenerator,
        keep_loop: bool,
        bar: bool = True,
    ) -> Callable[[], list[Trajectory]]:
        """What plays the episodes of one generation batch, of this rank alone; arguments as of `play`."""
        if keep_loop and self._loop is None:
            self._loop = EpisodeLoop()
        spent = self._purse() if step.training else lambda: False

        def answered() -> bool:
            beat()
            return spent()

        return partial(
            play,
            self.environment,
            step.rows,
            prompt_ids,
            self._seeds(step),
            generator,
            self.tokenizer,
            self._limits(),
            self._loop if keep_loop else None,
            progress=bar and self.accelerator.is_main_process and not self.args.disable_tqdm,
            out_of_money=answered,
            rounds=generator.in_step,
        )

    def played(
        self, step: GenerationStep, prompt_ids: list[Any], plain: bool, trajectories: list[Trajectory]
    ) -> Played:
        """One generation batch of all ranks, as it was played."""
        args = self.args
        step.trajectories = trajectories
        flat = [flatten(t, self.tokenizer.pad_token_id) for t in trajectories]

        mine = [account(len(ids), sum(f.policy), t) for ids, f, t in zip(prompt_ids, flat, trajectories, strict=True)]
        everyone = gather_object(mine)
        kept = kept_rows([row.stop == "lost" for row in everyone], self.group if step.training else 1)
        causes = [row.cause for row in everyone]
        if step.training and (summary := self.losses.observe(causes)) is not None:
            logger.warning("%s", summary)
            self._note(step, everyone, kept)
        metrics = self._metrics(everyone, kept)
        if args.mask_truncated_completions:
            kept = [k and row.stop not in TRUNCATED for k, row in zip(kept, everyone, strict=True)]
        start = self.accelerator.process_index * len(mine)
        kept = kept[start : start + len(mine)]

        masks = [[k * p for p in f.policy] for f, k in zip(flat, kept, strict=True)]
        step.choices = gathered_choices([f.choices for f in flat], args.pad_to_multiple_of, self.accelerator.device)
        completions = [self._messages(t, plain) for t in trajectories]
        ids, logprobs = [f.ids for f in flat], [f.logprobs for f in flat]
        tokens = sum(row.prompt_tokens + row.policy_tokens for row in everyone)
        return Played((prompt_ids, ids, masks, completions, logprobs, {}, None, []), tokens, metrics)

    def _note(self, step: GenerationStep, rows: list[Account], kept: list[bool]) -> None:
        lost = [row for row in rows if row.stop == "lost"]
        if self.accelerator.is_main_process:
            causes = Counter(str(row.cause) for row in lost)
            tokens, usd = sum(row.policy_tokens for row in lost), sum(row.usd for row in lost)
            dropped = kept.count(False) - len(lost)
            lines = {"dropped": dropped, "tokens": tokens, "usd": usd}
            note(self.args.output_dir, step.number, "rollouts", causes, len(rows), **lines)

    def _seeds(self, step: GenerationStep) -> list[str]:
        keys = gather_object([row_key(row) for row in step.rows])
        start = self.accelerator.process_index * len(step.rows)
        return row_seeds(keys, step.named(self.args.seed))[start : start + len(step.rows)]

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

    def _messages(self, trajectory: Trajectory, plain: bool) -> Any:
        """What reward functions and the completions table get: messages with their owners, or the policy's text."""
        text = reader(self.tokenizer)
        if plain:
            return "".join(text(turn.ids) for turn in trajectory.turns if turn.owner == "policy")
        roles = {"policy": "assistant", "world": "tool"}
        messages = [{"role": roles[turn.owner], "content": text(turn.ids)} for turn in trajectory.turns]
        return messages or [{"role": "assistant", "content": ""}]

    # -------------------------------------------------------------------------------------- metrics and money

    def _metrics(self, rows: list[Account], kept: list[bool]) -> dict[str, float]:
        values: dict[str, float] = dict(rollout_metrics(rows, kept))
        own = self.environment.metrics()
        mine = {name: checked_metric("the environment's metrics", name, value) for name, value in own.items()}
        found = gather_object([mine])
        for name in sorted({name for f in found for name in f}):
            numbers = [f[name] for f in found if name in f]
            values[name] = sum(numbers) / len(numbers)
        values["cost/spent_usd"] = spent = self._spent()
        ceiling = self.args.max_cost_usd
        if ceiling is not None and spent >= ceiling:
            self.stop_because = f"${spent:.4f} are spent, max_cost_usd is {ceiling:g}: this step is the last"
        return values

    def _purse(self) -> Callable[[], bool]:
        """Whether the run's money is spent, by what this rank knows: all ranks' before the batch, its own since."""
        ceiling, environment = self.args.max_cost_usd, self.environment
        if ceiling is None:
            return lambda: False
        left = ceiling - self._spent() + environment.spent_usd()
        return lambda: environment.spent_usd() >= left

    def _spent(self) -> float:
        return sum(gather_object([float(self.environment.spent_usd())]))

    def vllm(self, generation: Any, eos_ids: list[int]) -> VLLMGenerator:
        """The generator of TRL's vLLM, which has the current weights."""
        return VLLMGenerator(generation, self.tokenizer, sampling_of(self.args), eos_ids=eos_ids)
