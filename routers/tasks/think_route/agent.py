"""A trained think/route policy at work: a question in, its answer, what happened and what it cost out.

    from routers import RouterAgent
    with RouterAgent.from_pretrained("outputs/quickstart/think_route", "members.yaml") as agent:
        print(agent.answer("Who wrote Dune?", max_cost_usd=0.001).answer)

Every question is a rollout of its own (`srpo.rollout.loop.play`), in the caller's thread; their turns meet in one
batch on the model, so a question that waits for a slow member holds up nobody. This is the one module of `routers`
that imports the rollout loop of `srpo`: answering is what that loop does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from routers.data.catalogue import load_catalogue
from routers.pool import Pool, live_pool
from routers.tasks.think_route.agent_parts import AgentAnswer, Listening, OnTurn
from routers.tasks.think_route.environment import ThinkRoute
from routers.tasks.think_route.settings import AgentSettings
from srpo.rollout.generator import Request, Sample, TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling import Sampling
from srpo.rollout.shared import Batches, load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.untrusted import LockedTokenizer, without_control_tokens
from srpo.rollout.worker_loop import EpisodeLoop
from srpo.types import COST, LOST, Trajectory


class RouterAgent:
    """Answers questions with a policy and a pool. Safe in many threads and tasks at once; close it at the end.

    Args:
        model, tokenizer: the policy, in evaluation mode.
        pool: who is asked. Its ledger holds what was spent; a policy price there makes the policy's own tokens count.
        settings: how the policy was trained to ask.
        temperature: of the policy; 0: greedy.
        max_batch: turns that are generated together.
        max_concurrent: questions that `aanswer` and `submit` work on at once; further ones wait.
        call_seconds: deadline of one call of a member.
        episode_seconds: deadline of a question; looked at after every turn.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: Pool,
        settings: AgentSettings,
        *,
        temperature: float = 0.0,
        max_batch: int = 32,
        max_concurrent: int = 64,
        call_seconds: float = 45.0,
        episode_seconds: float = 180.0,
    ) -> None:
        tokenizer = LockedTokenizer(tokenizer)
        sampling = Sampling(temperature=temperature, stop=settings.grammar.stops)
        self.pool = pool
        self.settings = settings
        self._tokenizer = tokenizer
        self._clean = without_control_tokens(tokenizer)
        self._world = ThinkRoute(
            pool,
            grammar=settings.grammar,
            forward_empty=settings.forward_empty,
            failed_call="observe",
            call_seconds=call_seconds,
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        )
        self._limits = Limits(
            turns=settings.turns,
            tokens=settings.tokens,
            turn_tokens=settings.turn_tokens,
            observation_tokens=settings.observation_tokens,
            step_seconds=call_seconds + 15.0,
            episode_seconds=episode_seconds,
        )
        self._numbers = itertools.count()
        generator = TransformersGenerator(model, tokenizer, sampling, eos_ids=end_ids(model, tokenizer))
        self._batches = Batches(generator, max_batch)
        self._loop = EpisodeLoop()
        self._loop.start()
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="router-agent")
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        pool: Pool | str | Path,
        **options: Any,
    ) -> RouterAgent:
        """An agent from a checkpoint: a folder or Hub id, full weights or LoRA adapter, on the GPU if there is one.

        Args:
            name: with `agent.yaml` in it, which training writes; without, it is asked as Router-R1's checkpoints are.
            pool: who is asked: a pool, or the path of a catalogue whose members live behind OpenAI-compatible
                endpoints (`routers.pool.live_pool` takes a ledger and a reply cache as well).
            options: of the constructor.

        Raises:
            ValueError: the catalogue or the settings cannot be used.
            OSError: no such checkpoint.
        """
        model, tokenizer = load_checkpoint(str(name))
        asked = pool if isinstance(pool, Pool) else live_pool(load_catalogue(pool))
        return cls(model, tokenizer, asked, AgentSettings.load(name), **options)

    def answer(
        self,
        question: str,
        max_cost_usd: float | None = None,
        *,
        cost_weight: float | None = None,
        on_turn: OnTurn | None = None,
    ) -> AgentAnswer:
        """Answer one question; blocks until it is done.

        Args:
            question: any text; the policy's control tokens and the grammar's tags in it are made harmless.
            max_cost_usd: hard cap: a member is only asked if the most that it could cost still fits. The policy's own
                tokens count as well, after they were written.
            cost_weight: price sensitivity, for a policy that was trained with several; None: the first of them.
            on_turn: see `OnTurn`.

        Raises:
            ValueError: an empty question, a cap that is not a number >= 0, or a price sensitivity that the policy was
                not trained with.
            RuntimeError: the agent was closed.
        """
        if self._closed:
            raise RuntimeError("the agent was closed")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("the question is empty")
        if max_cost_usd is not None and not max_cost_usd >= 0:
            raise ValueError(f"max_cost_usd is {max_cost_usd!r}; it must be a number >= 0")
        weights = self.settings.cost_weights
        if cost_weight is None and weights:
            cost_weight = weights[0]
        if cost_weight is not None and cost_weight not in weights:
            known = ", ".join(map(str, weights)) or "none"
            raise ValueError(f"cost_weight is {cost_weight!r}; the policy was trained with: {known}")
        number = next(self._numbers)
        prompt = self.settings.messages(question, self._world.members, cost_weight=cost_weight, clean=self._clean)
        ids = self._tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.settings.chat_template_kwargs,
        )
        row = {"query": question, "prompt": prompt, "query_id": f"question {number}", "max_cost_usd": max_cost_usd}
        world: Any = self._world if on_turn is None else Listening(self._world, on_turn)
        generator = _Conversation(self._batches, number)
        found = play(world, [row], [ids], [f"{number}"], generator, self._tokenizer, self._limits, loop=self._loop)
        return self._answer(found[0])

    def submit(self, question: str, max_cost_usd: float | None = None, **options: Any) -> Future[AgentAnswer]:
        """`answer` in a thread of the agent's own: a future of the `AgentAnswer`."""
        return self._threads.submit(self.answer, question, max_cost_usd, **options)

    async def aanswer(self, question: str, max_cost_usd: float | None = None, **options: Any) -> AgentAnswer:
        """`answer` for asyncio."""
        return await asyncio.wrap_future(self.submit(question, max_cost_usd, **options))

    def close(self) -> None:
        """Finish what was begun, then end every thread and connection. Further questions are refused."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._loop.run([self.pool.aclose], 10.0)
        self._loop.close()
        self._batches.close()

    def __enter__(self) -> RouterAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, trajectory: Trajectory) -> AgentAnswer:
        columns = trajectory.columns
        written = sum(len(turn.ids) for turn in trajectory.turns if turn.owner == "policy")
        shown = sum(len(turn.ids) for turn in trajectory.turns if turn.owner == "world")
        return AgentAnswer(
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


class _Conversation:
    """One question's way to the shared batches; a number tells its rows from those of others."""

    def __init__(self, batches: Batches, number: int) -> None:
        self._batches = batches
        self._number = number

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        named = [Request(self._number, r.ids, r.seed, r.max_tokens, r.choices) for r in requests]
        return self._batches.ask(named)

    def finish(self) -> None:
        """The shared generator goes on."""
