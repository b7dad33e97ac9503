"""The world of a think/route agent: it thinks, asks members of the pool, reads their replies, and answers.

An environment for the rollout loop (`srpo.types`), in training, evaluation and serving alike. What the policy reads
and may write is in `routers.language.actions` (by default Router-R1's, arXiv:2506.09033), what it earns is decided by
rewards from the columns below. Everything is a function of (row, policy's text, members' replies): no history, no
clock.

Columns of an episode
    route           first member asked, None if none was; ``members`` all of them in order, ``calls`` their number
    cost            USD at catalogue prices of all calls, failed and cached ones too, and of the policy's own tokens
                    if those are counted
    seconds         of waiting for the pool
    answer          the final answer, None where there was no valid one
    em, f1          of the answer (evaluation.answers); ``correct`` is its score by the row's metric. None without gold
    format_error    "" or the first thing that was wrong with any turn; ``invalid_actions`` how many turns were
    feedback        why it was not right, in words; never the gold answer or a member's text
    lost            why the episode was lost to the pool, else None
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from routers.data.catalogue import Member
from routers.data.catalogue import cost as call_cost
from routers.evaluation.answers import METRICS, Metric, exact_match, f1, score
from routers.language.actions import Actions, Tags
from routers.language.grammar import Action, name_error
from routers.pool.ledger import Account, OverBudget
from routers.pool.pool import Pool
from routers.pool.protocol import EMPTY, OVER_BUDGET, kind
from srpo.texts import well_formed
from srpo.types import CORRECT, COST, FEEDBACK, LOST, ROUTE, Observation, Row, Stop

FailedCall = Literal["lost", "observe"]
REFUSALS = 2
"""A call that does not fit into the episode's budget is refused in words; this many end the episode."""
_NO_ANSWER: dict[Stop, str] = {
    "turns": "There was no answer within the allowed turns.",
    "tokens": "There was no answer within the allowed length.",
    "budget": "There was no answer within the budget.",
}


def cost_scale(members: Sequence[Member], *, prompt_tokens: int = 256, completion_tokens: int = 512) -> float:
    """USD that count as 1 in cost rewards: one call of this size to the dearest member. A constant of the catalogue.

    Raises:
        ValueError: a member has no prices, or every member is free, so that there is nothing to scale by.
    """
    if unpriced := [member.name for member in members if not member.priced]:
        raise ValueError(f"member {unpriced[0]!r} has no token prices; give the cost reward a scale in USD yourself")
    scale = max(call_cost(member, prompt_tokens, completion_tokens) for member in members)
    if scale <= 0:
        raise ValueError("every member of the pool is free; give the cost reward a scale in USD yourself")
    return scale


class ThinkRoute:
    """Makes one episode per row (`srpo.types.Environment`).

    Rows: ``query`` (the question); optional ``gold`` (accepted answers), ``metric``, ``query_id`` (the key of recorded
    replies and of the ledger), ``max_cost_usd``, and ``prompt`` (only counted).

    Args:
        pool: who answers, and the ledger.
        actions: who may be asked, and how the policy does it; None: the whole pool, as in Router-R1.
        metric: how answers are graded, where a row does not say.
        failed_call: what a call that failed for good does: "lost" takes the episode out of training (a fault of the
            pool is not the policy's), "observe" tells the policy, which can ask somebody else. A member that thought
            and came to no answer has not failed: the policy is told, and reads the end of the thoughts.
        call_seconds: deadline of one call, retries included. Keep it below the rollout's step deadline.
        max_cost_usd: of one episode. A call is made only if its upper bound fits; a billed retry can exceed it.
        count_tokens: tokens of a text; with it the policy's own tokens are booked at the ledger's policy price: prompt
            and observations as input once (the KV cache is kept), turns as output. Texts are all that is seen here, so
            the chat template's tokens and a turn cut by the length limit are not counted. None: they are free.
        observation_tokens: how much of a reply the rollout shows, so that no more is counted. None: all.

    Raises:
        ValueError: a name that is no member or cannot be copied by a policy, or a bad setting.
    """

    def __init__(
        self,
        pool: Pool,
        actions: Actions | None = None,
        *,
        metric: Metric = "em",
        failed_call: FailedCall = "lost",
        call_seconds: float = 45.0,
        max_cost_usd: float | None = None,
        count_tokens: Callable[[str], int] | None = None,
        observation_tokens: int | None = None,
    ) -> None:
        self.actions: Actions = actions or Tags(list(pool.members.values()))
        names = list(self.actions.names)
        for name in names:
            if problem := name_error(name):
                raise ValueError(f"{problem}; rename it in the catalogue, and give the endpoint's name as `model`")
            if name not in pool.members:
                raise ValueError(f"{name!r} is no member of the pool; there are {', '.join(pool.members)}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"members must be at least one name, each once; got {names}")
        if metric not in METRICS or failed_call not in get_args(FailedCall):
            raise ValueError(f"metric {metric!r} or failed_call {failed_call!r} is unknown")
        if not call_seconds > 0:
            raise ValueError(f"call_seconds is {call_seconds!r}; it must be positive")
        self.pool = pool
        self.names = names
        self.whole_turns, self.tools = self.actions.whole_turns, self.actions.tools
        self.metric: Metric = metric
        self.failed_call = failed_call
        self.call_seconds = call_seconds
        self.max_cost_usd = max_cost_usd
        self.count_tokens = count_tokens
        self.observation_tokens = observation_tokens

    @property
    def members(self) -> list[Member]:
        """Who may be asked, in the order of the prompt."""
        return [self.pool.members[name] for name in self.names]

    def episode(self, row: Row, seed: str) -> ThinkRouteEpisode:
        """A fresh episode. Nothing here is random: ``seed`` is not used.

        Raises:
            ValueError: names the row and the field that cannot be used.
        """
        return ThinkRouteEpisode(self, row)

    def metrics(self) -> Mapping[str, float]:
        metrics = self.pool.ledger.metrics()
        self.pool.ledger.new_step()
        return metrics

    def spent_usd(self) -> float:
        return self.pool.ledger.spent_usd

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.pool.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pool.ledger.load_state_dict(state["ledger"])


class ThinkRouteEpisode:
    """One question (`srpo.types.Episode`). Made by `ThinkRoute.episode`."""

    def __init__(self, world: ThinkRoute, row: Row) -> None:
        self._world = world
        self._question, self._gold, self._metric = _read(row, world.metric)
        self._query_id = str(row.get("query_id") or "")
        limit = row.get("max_cost_usd")
        self._account = Account(world.max_cost_usd if limit is None else limit)
        self._members: list[str] = []
        self._turns = self._invalid = self._refusals = 0
        self._cost = self._seconds = 0.0
        self._answer: str | None = None
        self._format_error = ""
        self._lost: str | None = None
        self._book(read=self._count(_prompt_text(row.get("prompt"))))

    def choices(self) -> None:
        return None

    async def step(self, text: str) -> Observation:
        """Parse one turn and answer it. Ends with an answer, or a tag of one, with a second refusal, or lost."""
        self._book(written=self._count(text))
        action = self._world.actions.parse(text, first=self._turns == 0)
        self._turns += 1
        if action.kind == "answer":
            self._answer = action.answer
            return Observation(end="done")
        if action.kind == "route":
            return await self._ask(action)
        self._invalid += 1
        self._format_error = self._format_error or action.error
        return Observation(end="done") if action.final else self._note(f"That turn was not valid. {action.error}")

    async def _ask(self, action: Action) -> Observation:
        member, query, pool = action.member or "", action.query or self._question, self._world.pool
        try:
            reservation = self._account.reserve(pool.bound(member, query))
        except OverBudget:
            self._refusals += 1
            if self._refusals >= REFUSALS:
                return Observation(end="budget")
            return self._note(
                f"{member} was not asked: it could cost more than is left for this question. Answer now."
            )
        self._members.append(member)
        try:
            left = reservation.amount + self._account.available  # for retries too
            reply = await pool.ask(member, query, self._world.call_seconds, query_id=self._query_id, max_cost=left)
            cost = pool.price(member, reply.usage)
            reservation.settle(cost)
        finally:
            reservation.cancel()  # only if nothing was settled
        self._cost += cost
        self._seconds += reply.seconds
        if reply.error is None:
            return self._shown(self._world.actions.reply(well_formed(reply.text), reply.reasoning))
        if kind(reply) == EMPTY and reply.reasoning:  # no fault of the pool: it thought until its tokens were used up
            return self._note(f"{member} came to no answer.", reply.reasoning)
        if kind(reply) == OVER_BUDGET or self._world.failed_call == "lost":
            self._lost = f"{member}: {reply.error}"
            return Observation(end="lost")
        return self._note(f"{member} could not be reached ({kind(reply)}).")

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        """See the module's docstring. ``correct`` is 0 without a valid answer."""
        lost, format_error = self._lost, self._format_error
        if self._answer is None:
            format_error = format_error or _NO_ANSWER.get(stop, "")
            if stop == "deadline":  # how fast the machines are is not the policy's doing
                lost = lost or "the deadline of the episode passed before an answer"
        graded = dict.fromkeys(("em", "f1", CORRECT)) if self._gold is None else self._grades(self._gold)
        return {
            ROUTE: self._members[0] if self._members else None,
            "members": list(self._members),
            "calls": len(self._members),
            COST: self._cost,
            "seconds": self._seconds,
            "answer": self._answer,
            **graded,
            "format_error": format_error,
            "invalid_actions": self._invalid,
            FEEDBACK: "" if lost else _feedback(format_error, graded[CORRECT], self._members),
            LOST: lost,
        }

    def _grades(self, gold: Sequence[str]) -> dict[str, float | None]:
        if not self._answer:
            return dict.fromkeys(("em", "f1", CORRECT), 0.0)
        em, right = exact_match(self._answer, gold), score(self._answer, gold, self._metric)
        return {"em": em, "f1": f1(self._answer, gold), CORRECT: right}

    def _note(self, words: str, reasoning: str = "") -> Observation:
        return self._shown(self._world.actions.reply(words, reasoning))

    def _shown(self, observation: Observation) -> Observation:
        limit = self._world.observation_tokens
        body = self._count(observation.body)
        if aside := self._count(observation.aside):
            body += self._count(observation.between) + aside
        frame = self._count(observation.before) + self._count(observation.after)
        self._book(read=frame + (body if limit is None else min(body, limit)))
        return observation

    def _count(self, text: str) -> int:
        return self._world.count_tokens(text) if self._world.count_tokens and text else 0

    def _book(self, read: int = 0, written: int = 0) -> None:
        """Charge tokens of the policy."""
        if read or written:
            usd = self._world.pool.ledger.policy(read, written, self._query_id)
            self._cost += usd
            self._account.charge(usd)


def _read(row: Row, metric: Metric) -> tuple[str, list[str] | None, Metric]:
    """(question, accepted answers or None, metric) of a dataset row."""
    label = f"row {row.get('query_id', row.get('query'))!r:.80}"
    question, gold, metric = row.get("query"), row.get("gold"), row.get("metric") or metric
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{label}: field 'query' is {question!r}; it must be the question")
    if metric not in METRICS:
        raise ValueError(f"{label}: field 'metric' is {metric!r}; use one of {', '.join(METRICS)}")
    if gold is None:
        return question, None, metric
    if isinstance(gold, str) or not all(isinstance(answer, str) for answer in gold) or not len(gold):
        raise ValueError(f"{label}: field 'gold' is {gold!r}; it must be a list of accepted answers")
    return question, list(gold), metric


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt or ())


def _feedback(format_error: str, correct: float | None, members: Sequence[str]) -> str:
    if format_error:
        return format_error
    if correct is None or correct >= 1.0:
        return ""
    asked = f"asking {', '.join(members)}" if members else "asking nobody"
    return f"The answer, given after {asked}, was {'wrong' if correct <= 0.0 else 'only partly right'}."
