"""One episode of a `StepRouter` from the inside: who acts now, and what is left. For agents that own their loop.

    with router.session("put a clean mug in coffeemachine.", cap=0.05) as session:
        while not done and (name := session.choose(observation, {"small": 0.0004, "large": 0.01})) is not None:
            reply = ask(name, observation)               # your call of a model; keep it below its bound
            session.paid(reply.usd, reply.action)
            observation, done = act(reply.action)        # your environment

Before a call its upper bound is reserved, afterwards `paid` settles it. `failed`, or leaving the block with a call
open, costs the whole bound, because the call may be billed. What no longer fits cannot be chosen: the cap holds for
every sequence of choices, as long as no call costs more than its bound. The policy reads, token for token, what a
rollout of the same episode would have shown it (`srpo.rollout.loop`).
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from routers.environments.alfworld.explorer import remember
from routers.environments.protocol import AgentEnvironment, Step, View
from routers.language.digest import digest
from routers.pool.ledger import OverBudget, Reservation
from routers.router import Decision, check_queries
from routers.tasks.step_routing.budget import BudgetGate
from routers.tasks.step_routing.environment import RoutedStep, Situation
from routers.tasks.step_routing.settings import StepSettings, Told
from srpo.rollout.loop import Labels, observation_ids
from srpo.rollout.turns import Request, Sample

Prefer = Callable[[Mapping[str, float], str], str]
"""(probability of each executor that can be chosen, the policy's choice) -> who acts, one of them."""


@dataclass(frozen=True)
class StepState:
    """An episode after some of its steps: enough to go on from there, in another session. Immutable."""

    first: str = ""
    """The first observation."""
    ids: tuple[int, ...] = ()
    """What the policy has read and written."""
    steps: tuple[RoutedStep, ...] = ()
    row: int | None = None
    """Names the episode in the policy's cache."""


@dataclass(frozen=True)
class _Asked:
    """A turn of the policy that is wanted: `choices` are the labels of `step.allowed`."""

    request: Request
    choices: tuple[int, ...]
    step: RoutedStep


class StepSession:
    """Made by `StepRouter.session`. One episode, one call at a time.

    Args:
        settings, gate: how the policy was trained, and the budget of this episode.
        tokenizer, labels, clean: of the policy; `clean` breaks control tokens in texts of others.
        submit: asks the policy.
        number: tells this episode's turns from those of others; the same for all of them.
        seed: names the dice of the policy's choices; None: the number.
        limit: steps of the episode; None: as many as in training.
        task, task_type: what has to be done, for prompts that say it.
        state: where the episode stands; a session may go on where another one stood.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(
        self,
        settings: StepSettings,
        gate: BudgetGate,
        tokenizer: Any,
        labels: Labels,
        clean: Callable[[str], str],
        submit: Callable[[Request], Future[Sample]],
        *,
        number: int,
        seed: str | None,
        limit: int | None,
        task: str = "",
        task_type: str = "",
        state: StepState | None = None,
    ) -> None:
        state = StepState() if state is None else state
        self.settings = settings
        self.gate = gate
        self.seed = f"episode {number}" if seed is None else seed
        self.limit = settings.step_limit if limit is None else limit
        if self.limit < 1:
            raise ValueError(f"step_limit is {self.limit}; it must be at least 1")
        self.stop: str | None = None
        """Why `choose` returns None: "budget", "turns" or "closed"."""
        self._tokenizer, self._labels, self._clean, self._submit = tokenizer, labels, clean, submit
        self._number = number if state.row is None else state.row
        self._told = Told(task, task_type, seed=self.seed)
        self._first, self._ids, self._steps = state.first, state.ids, list(state.steps)
        self._left = self.limit
        self._reservation: Reservation | None = None
        self._call = threading.Lock()  # held from a choice until its call is settled

    def choose(
        self,
        observation: str,
        bounds: Mapping[str, float] | None = None,
        *,
        steps_left: int | None = None,
        score: float = 0.0,
    ) -> str | None:
        """Who acts now; its bound is reserved until `paid` or `failed`.

        Args:
            observation: the first one, task included; later what came of the last action. Text of others: what it
                spells out is never a control token, and the choice is one token out of the affordable labels.
            bounds: USD that the next call of each executor costs at most. May be left out where calls are counted.
            steps_left: steps that the episode may still take, this one included; None: the limit less those taken.
            score: the environment's so far, in [0, 1], where it tells one (the policy of `progress` reads it).

        Returns:
            An executor's name; None: nothing fits, or no step is left. `stop` says which, and it stays so.

        Raises:
            ValueError: bounds that are not one number >= 0 per executor; a `force_small` budget that cannot pay for
                the episode; a first observation that a policy of ALFWorld's `compact` words cannot read.
            RuntimeError: the last call was not settled, or the router was closed.
        """
        return self.decide(observation, bounds, steps_left=steps_left, score=score).member

    async def achoose(
        self,
        observation: str,
        bounds: Mapping[str, float] | None = None,
        *,
        steps_left: int | None = None,
        score: float = 0.0,
    ) -> str | None:
        """`choose` for asyncio."""
        return (await self.adecide(observation, bounds, steps_left=steps_left, score=score)).member

    def decide(
        self,
        observation: str,
        bounds: Mapping[str, float] | None = None,
        *,
        steps_left: int | None = None,
        score: float = 0.0,
        among: Collection[str] | None = None,
        prefer: Prefer | None = None,
    ) -> Decision:
        """`choose`, with what the choice was made from.

        Args:
            observation, bounds, steps_left, score: as in `choose`.
            among: only these executors can do this step; None: all. Where none of them fits, the budget is the reason.
            prefer: has the last word, and is told the probabilities; the policy goes on as if it had chosen so.

        Returns:
            The executor; `scores`: the probability of each that could be chosen, renormalised over them; `policy_usd`
            and tokens of this decision, of which only what is new counts as read. Without a member `error` is `stop`.

        Raises:
            ValueError, RuntimeError: as `choose`.
        """
        with self._deciding():
            asked = self._asked(self._heard(observation, score), bounds, steps_left, among)
            return self._decided(asked, None if asked is None else self._submit(asked.request).result(), prefer)

    async def adecide(
        self,
        observation: str,
        bounds: Mapping[str, float] | None = None,
        *,
        steps_left: int | None = None,
        score: float = 0.0,
        among: Collection[str] | None = None,
        prefer: Prefer | None = None,
    ) -> Decision:
        """`decide` for asyncio: `observation`, `bounds`, `steps_left`, `score`, `among` and `prefer` as there."""
        with self._deciding():
            asked = self._asked(self._heard(observation, score), bounds, steps_left, among)
            if asked is None:
                return self._decided(None, None, prefer)
            sample: Sample = await asyncio.wrap_future(self._submit(asked.request))
            return self._decided(asked, sample, prefer)

    def paid(self, usd: float, action: str = "", error: str | None = None) -> None:
        """The call is over.

        Args:
            usd: what it cost. More than its bound is held against the budget (`violated`); what is not a number >= 0
                is not believed, and costs the bound.
            action: what the executor chose to do, in its words; the policy of `verbose` reads it with the observation.
            error: why it failed, where it did; for the record.

        Raises:
            RuntimeError: no call is open.
        """
        last = self._open_step()
        believed = usd if math.isfinite(usd) and usd >= 0 else last.bounds[last.executor]
        self.gate.settle(self._reservation, believed)  # type: ignore[arg-type]
        self._steps[-1] = replace(last, usd=last.usd + believed, action=action, error=error)
        self._reservation = None
        self._call.release()

    def failed(self, error: str = "failed") -> None:
        """The call failed. It may be billed, so it costs its whole bound; and a step."""
        self.paid(math.nan, error=error)

    def instead(self, scores: Mapping[str, float], error: str = "failed", usd: float = math.nan) -> str | None:
        """The open call failed, and the same step goes to somebody else: the likeliest who still fits.

        Args:
            scores: of those who can do it and were not tried yet.
            error, usd: of the failed call, as in `paid`; its money counts for the step.

        Returns:
            Who acts now; None: nobody is left, and the step has failed.

        Raises:
            RuntimeError: no call is open.
        """
        last = self._open_step()
        self.paid(usd, error=error)
        with self._deciding():
            fitting = self.gate.allowed(last.bounds, self._left)
            if (name := self._reserved(scores, None, last.bounds, fitting)) is None:
                return None
            self._steps[-1] = replace(self._steps[-1], executor=name, probability=scores[name])
            self._ids = (*self._ids[:-1], *self._tokens([name]))
        return name

    def close(self, error: str = "left open") -> None:
        """The episode is over. A call that is still open has failed."""
        if self._reservation is not None:
            self.failed(error)
        self.stop = self.stop or "closed"

    @property
    def steps(self) -> tuple[RoutedStep, ...]:
        """All steps so far; the last one's observation is known with the next choice."""
        return tuple(self._steps)

    @property
    def ids(self) -> tuple[int, ...]:
        """What the policy has read and written, from its prompt to its last choice."""
        return self._ids

    @property
    def state(self) -> StepState:
        """Where the episode stands. While a call is open, its step is in it, without action and money."""
        return StepState(self._first, self._ids, tuple(self._steps), self._number)

    @property
    def remaining(self) -> float:
        """In the budget's unit; infinite without a cap."""
        return self.gate.remaining

    @property
    def violated(self) -> bool:
        """Whether a call cost more than its bound."""
        return self.gate.violated

    @property
    def executor_usd(self) -> float:
        return sum(step.usd for step in self._steps)

    @property
    def policy_usd(self) -> float:
        """The policy's own tokens, each token of the context once (it is cached)."""
        return self.settings.policy_usd(len(self._ids) - len(self._steps), len(self._steps))

    def __enter__(self) -> StepSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        if not self._call.acquire(blocking=False):
            raise RuntimeError("the last call is still open: say paid() or failed() before the next choose()")
        try:
            yield
        finally:
            if self._reservation is None:
                self._call.release()

    def _heard(self, observation: str, score: float) -> View:
        """The episode as it would look if it were played in an environment of ours."""
        texts = [*(step.observation for step in self._steps[:-1]), observation]
        told = cast(AgentEnvironment, replace(self._told, score=score))
        steps = tuple(Step(step.action, text) for step, text in zip(self._steps, texts, strict=False))
        view = View(self._first if steps else observation, steps, (), told, self.seed)
        if not steps and self.settings.observation == "compact" and remember(view).goal is None:
            raise ValueError(
                "this policy was trained on ALFWorld's `compact` words, and the first observation is not a text of "
                "ALFWorld with its task: train one with observation: progress or verbose for other environments"
            )
        return view

    def _open_step(self) -> RoutedStep:
        if self._reservation is None:
            raise RuntimeError("no call is open: choose() comes first, then paid() or failed(), once")
        return self._steps[-1]

    def _asked(
        self,
        view: View,
        given: Mapping[str, float] | None,
        steps_left: int | None,
        among: Collection[str] | None,
    ) -> _Asked | None:
        """The next turn of the policy; None where the episode is over. May be asked again after an error."""
        if self.stop is not None:
            return None
        left = self.limit - len(self._steps) if steps_left is None else steps_left
        bounds = self._bounds(given)
        if self._steps:
            self._steps[-1] = replace(self._steps[-1], observation=view.steps[-1].observation)
        else:
            self._first = view.first
            if not self.gate.begun:
                self.gate.check_start(bounds, left)
        affordable = self.gate.allowed(bounds, left) if left > 0 else ()
        allowed = tuple(name for name in affordable if among is None or name in among)
        if not allowed:
            self.stop = "budget" if left > 0 else "turns"
            return None
        self._left = left
        calls = tuple(step.executor for step in self._steps)
        situation = Situation(view, left, self.gate, calls, self.gate.remaining, bounds, allowed)
        step = RoutedStep(allowed[0], allowed, bounds, self.gate.remaining, 0.0)
        request = self._request(situation)
        return _Asked(request, request.choices or (), step)

    def _request(self, situation: Situation) -> Request:
        """The policy's turn."""
        if self._steps:
            ids = (*self._ids, *self._observed(situation))
        else:
            ids = tuple(self.settings.start_ids(situation, self._tokenizer, self._clean))
        choices = self._tokens(situation.affordable)
        return Request(self._number, ids, f"{self.seed}:{len(self._steps)}", 1, choices)

    def _tokens(self, names: Sequence[str]) -> tuple[int, ...]:
        """Whoever they are, in the policy's words."""
        return self._labels.ids(tuple(self.settings.names[name] for name in names))

    def _decided(self, asked: _Asked | None, sample: Sample | None, prefer: Prefer | None) -> Decision:
        if asked is None or sample is None:
            return Decision((), {}, error=str(self.stop))
        allowed, before = asked.step.allowed, len(self._ids)
        chosen = allowed[asked.choices.index(sample.ids[0])]
        scores = dict(zip(allowed, map(math.exp, sample.scores), strict=False))
        wanted = chosen if prefer is None else prefer(scores, chosen)
        if wanted not in allowed:
            raise ValueError(f"{wanted!r} cannot be preferred: it is none of {', '.join(allowed)}")
        name = self._reserved(scores, wanted, asked.step.bounds, allowed)
        if name is None:  # others on the same account were faster
            self.stop = "budget"
            return Decision((), scores, error="budget")
        [token] = self._tokens([name])
        probability = math.exp(sample.logprobs[0]) if name == chosen else scores[name]
        self._ids = (*asked.request.ids, token)
        self._steps.append(replace(asked.step, executor=name, probability=probability))
        read = len(asked.request.ids) - before
        return Decision((name,), scores, None, self.settings.policy_usd(read, 1), read, 1)

    def _reserved(
        self, scores: Mapping[str, float], wanted: str | None, bounds: Mapping[str, float], fitting: Collection[str]
    ) -> str | None:
        """Reserve the wanted call, or the likeliest of `scores` that fits; None: none does."""
        order = sorted((name for name in scores if name in fitting), key=lambda name: -scores[name])
        for name in order if wanted is None else (wanted, *order):
            try:
                self._reservation = self.gate.reserve(name, bounds)
            except OverBudget:
                continue
            return name
        return None

    def _observed(self, situation: Situation) -> tuple[int, ...]:
        observation = self.settings.style.describe(situation)
        return observation_ids(observation, self._tokenizer, self.settings.observation_tokens)

    def _bounds(self, given: Mapping[str, float] | None) -> dict[str, float]:
        names = self.settings.executors
        if given is None and self.gate.budget.unit == "large_calls":
            return dict.fromkeys(names, 0.0)
        if given is None or set(given) != set(names):
            found = "none" if given is None else ", ".join(given)
            raise ValueError(f"bounds are needed for each of {', '.join(names)}; given: {found}")
        if bad := [name for name in names if not (math.isfinite(given[name]) and given[name] >= 0)]:
            raise ValueError(f"the bound of {bad[0]} is {given[bad[0]]!r}; it must be a number of USD >= 0")
        return {name: float(given[name]) for name in names}


def first_call(router: Any, query: str, context: Any, members: Sequence[str] | None) -> Decision:
    """Who would answer the first call of an agent, without a cap: `StepRouter.route` and that of rules.

    Raises:
        ValueError: `members` holds nobody that the router has, or the query is empty.
    """
    names = router.settings.executors
    if members is not None and not set(members) & set(names):
        raise ValueError(f"members {', '.join(members)}: it was trained with {', '.join(names)}")
    if context is None:
        check_queries([query])
    found = digest([{"role": "user", "content": query}] if context is None else context)
    with router.session(found.task, seed=found.text) as session:
        decision: Decision = session.decide(found.text, dict.fromkeys(names, 0.0), among=members)
        return decision
