"""A trained router of agent steps at work: which executor acts at this step, under a hard budget.

    from routers import StepRouter
    with StepRouter.from_pretrained("outputs/quickstart/bopo") as router:
        played = router.play(environment, executors, cap=2)        # an `AgentEnvironment`, played to its end
        session = router.session(task, cap=2)                      # or your agent's own loop: session.py
    conversations = Conversations(router, cap=2)               # or many agents that speak messages: conversations.py

Both tell the policy an episode as its rollouts did, token for token; `play` is that loop itself. Episodes of several
threads and tasks share the model, their decisions meet in one batch.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from routers.environments.protocol import AgentEnvironment, Executor
from routers.environments.react import ReActExecutor
from routers.pool.ledger import Account
from routers.router import Decision, Router, RouterFile
from routers.tasks.step_routing.arguments import Unit
from routers.tasks.step_routing.budget import BudgetGate
from routers.tasks.step_routing.environment import RoutedStep, StepRoutingEnvironment, StepRoutingEpisode
from routers.tasks.step_routing.session import StepSession, StepState, first_call
from routers.tasks.step_routing.settings import KIND, StepSettings
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Labels, Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.shared import Batches, load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import Request, Sample
from srpo.rollout.worker_loop import EpisodeLoop, Failure
from srpo.texts import LockedTokenizer, without_control_tokens
from srpo.types import LOST, Environment, Row, Stop, Trajectory

GRACE_SECONDS = 15.0
"""An executor that does not keep its own deadline is left behind after so much more."""


@dataclass(frozen=True)
class PlayedEpisode:
    """What became of one episode."""

    score: float
    """Of the environment, in [0, 1]."""
    won: bool
    stop: Stop
    """done: won, or over for good. turns: the step limit. budget: nothing was affordable. lost: see `error`."""
    error: str | None
    """Why the environment or an executor raised, or did not come back in time; the money of the open call counts."""
    steps: tuple[RoutedStep, ...]
    executor_usd: float
    policy_usd: float
    """The policy's own tokens at `StepSettings.policy_price`; not a part of the cap."""
    violated: bool
    """Whether a call cost more than its bound; without that the cap cannot be passed."""
    ids: tuple[int, ...]
    """What the policy read and wrote."""

    @property
    def cost_usd(self) -> float:
        return self.executor_usd + self.policy_usd


class StepRouter(Router):
    """Decides for many episodes at once who acts next. Safe in many threads and tasks; close it at the end.

    Args:
        model, tokenizer: the policy, in evaluation mode.
        settings: how it was trained.
        temperature: None: that of the training, which draws from the probabilities that were optimised. 0 always takes
            the likeliest executor, which is another policy: the quickstart's BoPO loses 3 points of success, BoSFT 25.
        max_batch: decisions that are made together.
        max_concurrent: episodes that are played at once; further ones wait. Sessions are not limited.
        call_seconds: deadline of one call of an executor, in `play`.
        cache_tokens: of episodes whose turn it is not, kept in the model's cache (Qwen2.5-1.5B: 28 kB each in bf16).

    Raises:
        ValueError: a label is not one token of this tokenizer.
    """

    kind = KIND
    name = "step router"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: StepSettings,
        *,
        temperature: float | None = None,
        max_batch: int = 32,
        max_concurrent: int = 64,
        call_seconds: float = 60.0,
        cache_tokens: int = 32_768,
    ) -> None:
        self.settings = settings
        self._tokenizer = LockedTokenizer(tokenizer)
        self._labels = Labels(self._tokenizer)
        self._labels.ids(settings.labels)
        self._clean = without_control_tokens(self._tokenizer)
        self._call_seconds = call_seconds
        self._numbers = itertools.count()
        sampling = Sampling(settings.temperature if temperature is None else temperature)
        generator = TransformersGenerator(
            model,
            self._tokenizer,
            sampling,
            eos_ids=end_ids(model, self._tokenizer),
            keep_tokens=cache_tokens,
        )
        self._batches = Batches(generator, max_batch)
        self._loop = EpisodeLoop()
        self._loop.start()
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="step-router")
        self._pools: dict[int, Any] = {}
        self._closed = False

    @classmethod
    def from_pretrained(cls, name: str | Path, settings: StepSettings | None = None, **options: Any) -> StepRouter:
        """A router from a checkpoint: a folder or Hub id, full weights or LoRA adapter, on the GPU if there is one.

        Args:
            name: with `router.yaml` in it, which `srpo train` writes.
            settings: in place of that file.
            options: of the constructor.

        Raises:
            ValueError: there are no settings, or they cannot be used.
            OSError: no such checkpoint.
        """
        given = StepSettings.load(name) if settings is None else settings
        model, tokenizer = load_checkpoint(str(name))
        return cls(model, tokenizer, given, **options)

    @classmethod
    def load(
        cls, name: str, file: RouterFile, members: Any = None, catalogue: Any = None, **options: Any
    ) -> StepRouter:
        """For `routers.load_router`; the executors are part of what the policy learned, and cannot be changed."""
        if members is not None or catalogue is not None:
            raise ValueError(f"{file.path}: a step router keeps the executors that it was trained with")
        return cls.from_pretrained(name, file.settings_of(StepSettings), **options)

    def session(
        self,
        task: str = "",
        cap: float | None = None,
        *,
        unit: Unit | None = None,
        seed: str | None = None,
        step_limit: int | None = None,
        task_type: str = "",
        state: StepState | None = None,
        account: Account | None = None,
    ) -> StepSession:
        """One episode of an agent that owns its loop: see `routers.tasks.step_routing.session`.

        Args:
            task: what has to be done, in words; prompts of `compact` and `progress` begin with it.
            cap: hard limit of what the executors may cost; None: no limit.
            unit: of the cap, usd or large_calls; None: the one that the policy was trained with. With the other one it
                reads a budget that it has never seen; the cap holds all the same.
            seed: names the episode: the same observations and seed give the same choices; None: a number.
            step_limit: None: that of the training.
            task_type: kind of the task, for prompts of `progress`.
            state: where the episode stands, of another session with this seed; None: it begins.
            account: pays; sessions that share a budget share it. None: one of its own.

        Raises:
            ValueError: an account with another cap; a cap or limit that is no such thing.
            RuntimeError: the router was closed.
        """
        if self._closed:
            raise RuntimeError("the router was closed")
        return StepSession(
            self.settings,
            BudgetGate(self.settings.budget(cap, unit), account),
            self._tokenizer,
            self._labels,
            self._clean,
            self._batches.submit,
            number=next(self._numbers),
            seed=seed,
            limit=step_limit,
            task=task,
            task_type=task_type,
            state=state,
        )

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """Who would answer the first call of an agent: a conversation of one message, without a cap.

        Args:
            query: what the agent is asked to do.
            context: the messages of the call, in place of `query`; see `Conversations` for whole conversations.
            members: choose among these only.

        Raises:
            CannotDo: a cost weight, or a policy that reads ALFWorld's words only.
            ValueError: `members` holds nobody that it was trained with, or the query is empty.
        """
        if cost_weight is not None:
            raise self._cannot("take a cost_weight: it was trained with one")
        if self.settings.observation == "compact":
            raise self._cannot("route a query where it was trained on ALFWorld's `compact` words")
        return first_call(self, query, context, members)

    def play(
        self,
        environment: AgentEnvironment,
        executors: Sequence[Executor],
        cap: float | None = None,
        *,
        unit: Unit | None = None,
        seed: str | None = None,
    ) -> PlayedEpisode:
        """Play a fresh environment to its end, in a thread of the router's own; blocks until then.

        Args:
            environment: single use.
            executors: those that the policy was trained with, by name.
            cap, unit, seed: as in `session`; the seed is also the one of scripted executors' dice.

        Raises:
            ValueError: other executors, or what `StepSession.choose` refuses.
            RuntimeError: the router was closed.
        """
        return self.submit(environment, executors, cap, unit=unit, seed=seed).result()

    def submit(
        self,
        environment: AgentEnvironment,
        executors: Sequence[Executor],
        cap: float | None = None,
        *,
        unit: Unit | None = None,
        seed: str | None = None,
    ) -> Future[PlayedEpisode]:
        """`play`, as a future; `environment`, `executors`, `cap`, `unit` and `seed` as there."""
        return self._threads.submit(self._play, environment, executors, cap, unit, seed)

    async def aplay(
        self, environment: AgentEnvironment, executors: Sequence[Executor], cap: float | None = None, **options: Any
    ) -> PlayedEpisode:
        """`play` for asyncio."""
        return await asyncio.wrap_future(self.submit(environment, executors, cap, **options))

    def _play(
        self,
        environment: AgentEnvironment,
        executors: Sequence[Executor],
        cap: float | None,
        unit: Unit | None,
        seed: str | None,
    ) -> PlayedEpisode:
        named = {executor.name: executor for executor in executors}
        if set(named) != set(self.settings.executors):
            raise ValueError(
                f"executors are {', '.join(named)}; the policy was trained with {', '.join(self.settings.executors)}"
            )
        if self._closed:
            raise RuntimeError("the router was closed")
        self._pools.update({id(e.pool): e.pool for e in executors if isinstance(e, ReActExecutor)})
        how, number = self.settings, next(self._numbers)
        seed = f"episode {number}" if seed is None else seed
        ordered = [named[name] for name in how.executors]
        worlds = StepRoutingEnvironment(
            lambda row: environment, ordered, how.style.describe, how.budget(cap, unit), how.labels, self._call_seconds
        )
        limits = Limits(environment.limit, 2**31, how.observation_tokens, self._call_seconds + GRACE_SECONDS)

        async def begin() -> StepRoutingEpisode:
            return worlds.episode({}, seed, refuse=False)

        [episode] = self._loop.run([begin], limits.step_seconds)
        if isinstance(episode, Failure):
            if (why := episode.cause).startswith("ValueError: "):
                raise ValueError(why.removeprefix("ValueError: "))
            return PlayedEpisode(0.0, False, "lost", why, (), 0.0, 0.0, False, ())
        if not episode.situation.affordable:
            return PlayedEpisode(environment.score, environment.won, "budget", None, (), 0.0, 0.0, False, ())
        prompt = how.start_ids(episode.situation, self._tokenizer, self._clean)
        turns, begun = _Turns(self._batches, number), cast(Environment, _Begun(episode))
        [played] = play(begun, [{}], [prompt], [seed], turns, self._tokenizer, limits, self._loop)
        return self._told(episode, environment, played)

    def _told(self, episode: StepRoutingEpisode, environment: AgentEnvironment, played: Trajectory) -> PlayedEpisode:
        lost = played.stop == "lost"
        decisions = [turn for turn in played.turns if turn.owner == "policy"]
        steps = [
            replace(step, probability=math.exp(turn.logprobs[0]))  # type: ignore[index]
            for step, turn in zip(episode.steps, decisions, strict=False)
        ]
        error = played.columns[LOST] if lost else None
        if episode.broken:
            steps[-1] = replace(steps[-1], error=error)
        ids = (*played.prompt_ids, *(i for turn in played.turns for i in turn.ids))
        read = len(ids) - len(decisions)
        return PlayedEpisode(
            score=0.0 if lost else environment.score,
            won=not lost and environment.won,
            stop=played.stop,
            error=error,
            steps=tuple(steps),
            executor_usd=sum(step.usd for step in steps),
            policy_usd=self.settings.policy_usd(read, len(decisions)),
            violated=episode.gate.violated,
            ids=ids,
        )

    def close(self) -> None:
        """Finish what was begun, then end every thread and connection. Open sessions raise at their next choice."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._loop.run([pool.aclose for pool in self._pools.values()], 10.0)
        self._loop.close()
        self._batches.close()


class _Turns:
    """A `Generator` for one episode: its turns meet those of others in the router's batches."""

    def __init__(self, batches: Batches, number: int) -> None:
        self._batches, self._number = batches, number

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        return self._batches.ask([replace(request, row=self._number, told=None) for request in requests])

    def over(self, rows: Sequence[int]) -> None: ...

    def finish(self) -> None: ...


class _Begun:
    """All that `play` asks an `Environment` for: the one episode that has begun, because its prompt is made of it."""

    def __init__(self, episode: StepRoutingEpisode) -> None:
        self._episode = episode

    def episode(self, row: Row, seed: str) -> StepRoutingEpisode:
        return self._episode
