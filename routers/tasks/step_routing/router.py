"""A trained router of agent steps at work: which executor acts at this step, under a hard budget.

    from routers import StepRouter
    with StepRouter.from_pretrained("outputs/quickstart/bopo") as router:
        played = router.play(environment, executors, cap=2)        # an `AgentEnvironment`, played to its end
        session = router.session(task, cap=2)                      # or your agent's own loop: session.py

Both are one mechanism: `play` is a loop around a session. Episodes of several threads and tasks share the model, their
decisions meet in one batch.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from routers.environments.protocol import AgentEnvironment, Executor, Session, View
from routers.environments.react import ReActExecutor
from routers.tasks.step_routing.budget import BudgetGate
from routers.tasks.step_routing.session import StepSession
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.step_parts import PlayedEpisode
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Labels
from srpo.rollout.sampling import Sampling
from srpo.rollout.shared import Batches, load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.untrusted import LockedTokenizer, without_control_tokens
from srpo.rollout.worker_loop import EpisodeLoop, Failure
from srpo.types import Stop

GRACE_SECONDS = 15.0
"""An executor that does not keep its own deadline is left behind after so much more."""


class StepRouter:
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
            name: with `step_router.yaml` in it, which scripts/train_bopo.py writes.
            settings: in place of that file.
            options: of the constructor.

        Raises:
            ValueError: there are no settings, or they cannot be used.
            OSError: no such checkpoint.
        """
        model, tokenizer = load_checkpoint(str(name))
        return cls(model, tokenizer, StepSettings.load(name) if settings is None else settings, **options)

    def session(
        self,
        task: str = "",
        cap: float | None = None,
        *,
        unit: str | None = None,
        seed: str | None = None,
        step_limit: int | None = None,
        task_type: str = "",
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

        Raises:
            ValueError: a cap or limit that is no such thing.
            RuntimeError: the router was closed.
        """
        if self._closed:
            raise RuntimeError("the router was closed")
        limit = self.settings.step_limit if step_limit is None else step_limit
        if limit < 1:
            raise ValueError(f"step_limit is {limit}; it must be at least 1")
        number = next(self._numbers)
        return StepSession(
            self.settings,
            BudgetGate(self.settings.budget(cap, unit)),
            self._tokenizer,
            self._labels,
            self._clean,
            self._batches.submit,
            number=number,
            seed=f"episode {number}" if seed is None else seed,
            limit=limit,
            task=task,
            task_type=task_type,
        )

    def play(
        self,
        environment: AgentEnvironment,
        executors: Sequence[Executor],
        cap: float | None = None,
        *,
        unit: str | None = None,
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
        unit: str | None = None,
        seed: str | None = None,
    ) -> Future[PlayedEpisode]:
        """`play`, as a future."""
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
        unit: str | None,
        seed: str | None,
    ) -> PlayedEpisode:
        named = {executor.name: executor for executor in executors}
        if set(named) != set(self.settings.executors):
            raise ValueError(
                f"executors are {', '.join(named)}; the policy was trained with {', '.join(self.settings.executors)}"
            )
        self._pools.update({id(e.pool): e.pool for e in executors if isinstance(e, ReActExecutor)})
        with self.session(cap=cap, unit=unit, seed=seed, step_limit=environment.limit) as session:
            world = Session(environment, session.seed)
            error, heard = None, list[str]()
            try:
                now = self._run(_advance(world, named, None, heard))
                while now is not None and (name := session.choose_in(*now)) is not None:
                    act = self._run(_acting(named[name], now[0], self._call_seconds))
                    session.paid(act.cost, act.action, act.reply.error)
                    now = self._run(_advance(world, named, act.action, heard))
                score, won, late = self._run(_result(environment))
                stop: Stop = "budget" if now is not None else "turns" if late else "done"
            except _Lost as lost:
                stop, error, score, won = "lost", str(lost), 0.0, False
                session.close(error)
        steps = [replace(step, observation=text) for step, text in zip(session.steps, heard, strict=False)]
        return PlayedEpisode(
            score=score,
            won=won,
            stop=stop,
            error=error,
            steps=(*steps, *session.steps[len(steps) :]),
            executor_usd=session.executor_usd,
            policy_usd=session.policy_usd,
            violated=session.violated,
            ids=session.ids,
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

    def __enter__(self) -> StepRouter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, job: Callable[[], Awaitable[Any]]) -> Any:
        """A job of an episode, on the one loop of all: who blocks it is left behind (`srpo.rollout.worker_loop`)."""
        [result] = self._loop.run([job], self._call_seconds + GRACE_SECONDS)
        if isinstance(result, Failure):
            raise _Lost(result.cause)
        return result


class _Lost(Exception):
    """The world of an episode failed."""


_Now = tuple[View, dict[str, float], int]
"""What a decision is based on: view, bounds in USD, steps left."""


def _advance(
    world: Session, executors: dict[str, Executor], action: str | None, heard: list[str]
) -> Callable[[], Awaitable[_Now | None]]:
    def advance() -> _Now | None:
        if action is None:
            world.start()
        else:
            heard.append(world.take(action)[0])
        environment = world.environment
        if environment.done:
            return None
        view = world.view
        bounds = {name: executor.bound(view) for name, executor in executors.items()}
        return view, bounds, environment.limit - environment.steps

    return lambda: world.advance(advance)


def _acting(executor: Executor, view: View, seconds: float) -> Callable[[], Awaitable[Any]]:
    async def acting() -> Any:
        return await executor.act(view, seconds)

    return acting


def _result(environment: AgentEnvironment) -> Callable[[], Awaitable[Any]]:
    async def result() -> Any:
        late = not environment.won and environment.steps >= environment.limit
        return environment.score, environment.won, late

    return result
