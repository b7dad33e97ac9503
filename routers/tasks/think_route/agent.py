"""A trained think/route policy at work: a question in, its answer, what happened and what it cost out.

    from routers import RouterAgent
    with RouterAgent.from_pretrained("outputs/quickstart/think_route", "members.yaml") as agent:
        print(agent.answer("Who wrote Dune?", max_cost_usd=0.001).answer)

Every question is a rollout of its own (`srpo.rollout.loop.play`), in the caller's thread; their turns meet in one
batch on the model, so a question that waits for a slow member holds up nobody. Whom a turn asks is chosen among the
members' names: no other can be written there.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from routers.data.billing import cost
from routers.data.catalogue import Member, load_catalogue
from routers.language.grammar import Action
from routers.language.prompts import stated_cost_weight
from routers.pool import Pool, live_pool
from routers.router import Answer, CannotDo, Decision, OnTurn, Router, RouterFile, members_now
from routers.tasks.think_route.drawing import BySampling, Drawing, DrawnRequest
from routers.tasks.think_route.environment import ThinkRoute
from routers.tasks.think_route.settings import KIND, AgentSettings
from srpo.rollout.constrained import choice_probabilities
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.shared import Batches, load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import Request, Sample
from srpo.rollout.worker_loop import EpisodeLoop
from srpo.texts import LockedTokenizer, opened_by, text_of
from srpo.types import COST, LOST, Episode, Observation, Row, Stop, Trajectory

AS_USUAL = Drawing()


class RouterAgent(Router):
    """Answers questions with a policy and a pool. Safe in many threads and tasks at once; close it at the end.

    Args:
        model, tokenizer: the policy, in evaluation mode.
        pool: who is asked. Its ledger holds what was spent; a policy price there makes the policy's own tokens count.
            None: the agent can `route`, and answers nothing.
        settings: how the policy was trained to ask.
        members: the pool, where there is none; None: that of the settings.
        temperature: of the policy; 0: greedy.
        max_batch: turns that are generated together.
        max_concurrent: questions that `aanswer` and `submit` work on at once; further ones wait.
        call_seconds: deadline of one call of a member.
        episode_seconds: deadline of a question; looked at after every turn.
    """

    kind = KIND

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: Pool | None,
        settings: AgentSettings,
        *,
        members: Sequence[Member] | None = None,
        temperature: float = 0.0,
        max_batch: int = 32,
        max_concurrent: int = 64,
        call_seconds: float = 45.0,
        episode_seconds: float = 180.0,
        name: str = "router",
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.pool = pool
        self.settings, self.cost_weights = settings, settings.cost_weights
        self.name = name
        self.members = tuple(pool.members.values() if pool else settings.members if members is None else members)
        self._made_from = made_from
        self._model = model
        self._tokenizer = LockedTokenizer(tokenizer)
        self._actions = settings.actions(self.members, self._tokenizer)
        self._mask = self._actions.mask(self._tokenizer)
        self._world = None if pool is None else self._make_world(pool, call_seconds)
        self._limits = Limits(
            turns=settings.turns,
            tokens=settings.tokens,
            turn_tokens=settings.turn_tokens,
            observation_tokens=settings.observation_tokens,
            step_seconds=call_seconds + 15.0,
            episode_seconds=episode_seconds,
        )
        self._numbers = itertools.count()
        self._sampling = Sampling(temperature=temperature, stop=self._actions.stops)
        ends = end_ids(model, self._tokenizer)
        make = partial(TransformersGenerator, model, self._tokenizer, eos_ids=ends, allowed=self._mask.state())
        self._batches = Batches(BySampling(make, self._sampling), max_batch)
        self._loop = EpisodeLoop()
        self._loop.start()
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="router-agent")
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        pool: Pool | str | Path,
        settings: AgentSettings | None = None,
        **options: Any,
    ) -> RouterAgent:
        """An agent from a checkpoint: a folder or Hub id, full weights or LoRA adapter, on the GPU if there is one.

        Args:
            name: with `router.yaml` in it, which training writes.
            pool: who is asked: a pool, or the path of a catalogue whose members live behind OpenAI-compatible
                endpoints (`routers.pool.live_pool` takes a ledger and a reply cache as well).
            settings: in place of that file; `AgentSettings()` for Router-R1's own checkpoints.
            options: of the constructor.

        Raises:
            ValueError: the catalogue or the settings cannot be used.
            OSError: no such checkpoint.
        """
        if settings is None:
            settings = AgentSettings.load(name)
        else:
            settings.check_policy(name)
        asked = pool if isinstance(pool, Pool) else live_pool(load_catalogue(pool))
        return cls(*load_checkpoint(str(name)), asked, settings, **options)

    @classmethod
    def load(
        cls,
        name: str,
        file: RouterFile,
        *,
        members: Sequence[str] | None = None,
        catalogue: str | Path | Mapping[str, Member] | None = None,
        pool: Pool | None = None,
        **options: Any,
    ) -> RouterAgent:
        """See `routers.load_router`. With a `pool`, its members are asked; else those of the catalogue, where they
        live behind endpoints."""
        settings = file.settings_of(AgentSettings, KIND)
        chosen = members_now(settings.members, members, pool.members if pool else catalogue)
        if pool is None and all(member.base_url for member in chosen):
            pool = live_pool({member.name: member for member in chosen})
        return cls(*load_checkpoint(name), pool, settings, members=chosen, made_from=file.made_from, **options)

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """Whom the agent's first turn asks. It abstains where it answers by itself, or its turn is broken.

        Raises:
            CannotDo: a context, or fewer members; an agent takes its turns by itself (`answer`).
            ValueError: an empty query, or a price sensitivity that was not trained.
        """
        if context is not None or members is not None:
            raise CannotDo("a think/route agent is asked a question, and drops members when it is loaded")
        row, prompt = self._row(query, None, cost_weight)
        limit = self.settings.turn_tokens or self.settings.tokens
        [turn] = self._batches.ask([Request(next(self._numbers), tuple(prompt), row["query_id"], limit)])
        scores: dict[str, float] = {}
        if begun := self._mask.inside(turn.ids):
            length, tree = begun
            context_ids = [*prompt, *turn.ids[:length]]
            [found] = choice_probabilities(self._batches.ask, [(tree, context_ids, next(self._numbers))])
            scores = dict.fromkeys(self._actions.names, 0.0)
            for alternative, probability in found.items():
                scores[self._actions.member_of(alternative)] += probability
        text = opened_by(self._tokenizer, prompt) + text_of(self._tokenizer, turn.ids)
        action = self._actions.parse(text, first=True)
        if self._actions.whole_turns and not turn.ended:
            action = Action("invalid", None, "", "The turn was longer than it may be.")
        return Decision(
            members=(action.member,) if action.member else (),
            scores=scores,
            usd=self._expected_usd(action.member) if action.member else 0.0,
            policy_usd=self.pool.ledger.policy(len(prompt), len(turn.ids), row["query_id"]) if self.pool else 0.0,
            prompt_tokens=len(prompt),
            completion_tokens=len(turn.ids),
            text=text,
            error=action.error or ("" if action.member else "The agent answered by itself."),
        )

    def _expected_usd(self, name: str) -> float | None:
        """USD of a call: by the training's table, else by the calls that the pool has made; None: there are none."""
        member = next(one for one in self.members if one.name == name)
        usd = self.settings.expected_usd(member)
        made = self.pool.ledger.members().get(name) if self.pool else None
        if usd is None and made is not None and made.calls > made.failed and member.priced:
            return cost(member, made.prompt_tokens / made.calls, made.completion_tokens / made.calls)
        return usd

    def answer(
        self,
        question: str,
        max_cost_usd: float | None = None,
        *,
        cost_weight: float | None = None,
        on_turn: OnTurn | None = None,
        drawing: Drawing = AS_USUAL,
    ) -> Answer:
        """Answer one question; blocks until it is done.

        Args:
            question: any text; the policy's control tokens and the grammar's tags in it are made harmless.
            max_cost_usd: hard cap: a member is only asked if the most that it could cost still fits. The policy's own
                tokens count as well, after they were written.
            cost_weight: price sensitivity, for a policy that was trained with several; None: the first of them.
            on_turn: see `OnTurn`.
            drawing: temperature, seed and length of this answer.

        Raises:
            CannotDo: there is no pool to ask.
            ValueError: an empty question, a number out of its range, or a price sensitivity that the policy was not
                trained with.
            RuntimeError: the agent was closed.
        """
        return self._play(_Interest(), question, max_cost_usd, cost_weight, on_turn, drawing)

    def _play(
        self,
        interest: _Interest,
        question: str,
        max_cost_usd: float | None,
        cost_weight: float | None,
        on_turn: OnTurn | None,
        drawing: Drawing,
    ) -> Answer:
        if self._world is None:
            raise CannotDo("the agent has nobody to ask: give load_router a catalogue whose members have a base_url")
        if max_cost_usd is not None and not max_cost_usd >= 0:
            raise ValueError(f"max_cost_usd is {max_cost_usd!r}; it must be a number >= 0")
        sampling, limits, number = drawing.sampling(self._sampling), self._limits, next(self._numbers)
        if drawing.tokens is not None:
            limits = replace(limits, tokens=min(limits.tokens, drawing.tokens))
        row, ids = self._row(question, max_cost_usd, cost_weight)
        world: Any = _Listening(self._world, interest, on_turn)
        generator = _Conversation(self._batches, number, interest, sampling)
        seed = f"{number}" if drawing.seed is None else f"seed {drawing.seed}"
        found = play(world, [row], [ids], [seed], generator, self._tokenizer, limits, loop=self._loop)
        return self._answer(found[0])

    def _row(self, question: str, cap: float | None, cost_weight: float | None) -> tuple[dict[str, Any], list[int]]:
        """The question as the world knows it, and the ids of its prompt."""
        if self._closed:
            raise RuntimeError("the agent was closed")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("the question is empty")
        weight = stated_cost_weight(self.settings.cost_weights, cost_weight)
        prompt = self._actions.prompt(question, weight)
        ids = self._actions.ids(prompt)
        name = f"question {next(self._numbers)}"
        return {"query": question, "prompt": prompt, "query_id": name, "max_cost_usd": cap}, ids

    def submit(self, question: str, max_cost_usd: float | None = None, **options: Any) -> Future[Answer]:
        """`answer` in a thread of the agent's own: a future of the `Answer`."""
        return self._threads.submit(self.answer, question, max_cost_usd, **options)

    async def aanswer(
        self,
        question: str,
        max_cost_usd: float | None = None,
        *,
        cost_weight: float | None = None,
        on_turn: OnTurn | None = None,
        drawing: Drawing = AS_USUAL,
    ) -> Answer:
        """`answer` for asyncio, with its arguments: `question`, `max_cost_usd`, `cost_weight`, `on_turn`, `drawing`.

        Cancelled, it ends at once where it waits, for a member too; a turn of the policy that is being written is the
        last.
        """
        interest = _Interest()
        play = copy_context().run  # so that calls of members know whose they are
        future = self._threads.submit(
            play, self._play, interest, question, max_cost_usd, cost_weight, on_turn, drawing
        )
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            interest.lose()
            raise

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Finish what was begun, then end every thread and connection. Further questions are refused."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self.pool is not None:
            self._loop.run([self.pool.aclose], 10.0)
        self._loop.close()
        self._batches.close()

    def save(self, folder: str | Path) -> None:
        """Weights, tokenizer and `router.yaml`, with the pool as it is now."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self.settings.with_members(self.members).save(folder, self._made_from)

    def _make_world(self, pool: Pool, call_seconds: float) -> ThinkRoute:
        return ThinkRoute(
            pool,
            self._actions,
            failed_call="observe",
            call_seconds=call_seconds,
            count_tokens=self.count_tokens,
        )

    def _answer(self, trajectory: Trajectory) -> Answer:
        columns = trajectory.columns
        written = sum(len(turn.ids) for turn in trajectory.turns if turn.owner == "policy")
        shown = sum(len(turn.ids) for turn in trajectory.turns if turn.owner == "world")
        return Answer(
            answer=columns.get("answer"),
            stop=trajectory.stop,
            error=columns[LOST],
            cost_usd=float(columns.get(COST) or 0.0),
            members=tuple(columns.get("members") or ()),
            prompt_tokens=len(trajectory.prompt_ids) + shown,
            completion_tokens=written,
            turns=tuple(
                (turn.owner, self._tokenizer.decode(turn.ids, skip_special_tokens=True)) for turn in trajectory.turns
            ),
            trajectory=trajectory,
        )


class _Interest:
    """Whether anybody still waits for a question. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lost = False
        self._calls: list[Callable[[], object]] = []

    def lose(self) -> None:
        """Nobody does: end what was told to `ending`, and whatever comes next."""
        with self._lock:
            self._lost = True
            calls = list(self._calls)
        for call in calls:
            with suppress(RuntimeError):  # its event loop has ended before it
                call()

    @contextmanager
    def ending(self, call: Callable[[], object]) -> Iterator[None]:
        """Within, `call` ends what is going on, from any thread.

        Raises:
            ConnectionAbortedError: nobody waits any more.
        """
        with self._lock:
            if self._lost:
                raise ConnectionAbortedError("nobody waits for the answer any more")
            self._calls.append(call)
        try:
            yield
        finally:
            with self._lock:
                self._calls.remove(call)


class _Conversation:
    """One question's way to the shared batches; a number tells its rows from those of others."""

    def __init__(self, batches: Batches, number: int, interest: _Interest, sampling: Sampling) -> None:
        self._batches = batches
        self._number = number
        self._interest = interest
        self._sampling = sampling

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        futures: list[Future[Sample]] = []
        with self._interest.ending(lambda: [future.cancel() for future in list(futures)]):
            for request in requests:
                own = replace(request, row=self._number, told=None)
                futures.append(self._batches.submit(DrawnRequest.of(own, self._sampling)))
            return [future.result() for future in futures]

    def over(self, rows: Sequence[int]) -> None: ...

    def finish(self) -> None:
        """The shared generator goes on."""


class _Listening:
    """A world that tells somebody what the policy writes, and stops when nobody waits for it."""

    def __init__(self, world: ThinkRoute, interest: _Interest, on_turn: OnTurn | None) -> None:
        self._world = world
        self._interest = interest
        self._on_turn = on_turn
        self.whole_turns = world.whole_turns

    def episode(self, row: Row, seed: str) -> Episode:
        return _ListeningEpisode(self._world.episode(row, seed), self._interest, self._on_turn)


class _ListeningEpisode:
    def __init__(self, episode: Episode, interest: _Interest, on_turn: OnTurn | None) -> None:
        self._episode = episode
        self._interest = interest
        self._on_turn = on_turn

    def choices(self) -> Sequence[str] | None:
        return self._episode.choices()

    async def step(self, text: str) -> Observation:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with self._interest.ending(lambda: loop.call_soon_threadsafe(task.cancel)):
            if self._on_turn is not None:
                self._on_turn(text)
            return await self._episode.step(text)

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        return self._episode.columns(stop)
