"""A scripted executor that costs what a member of a price list would cost in its place, prompt cache included.

Its prompt is ``extra_prompt_tokens`` of the member (a harness's system prompt and tools) and the episode so far, by
`estimated_tokens`; its answer is `COMPLETION_TOKENS`. What of the prompt is cached follows from who acted when
(`Step.by`, `Step.at`), so that nothing has to be kept: the same episode costs the same, in whatever process it is
played. Time passes by members' ``latency``.
"""

from __future__ import annotations

from dataclasses import replace

from routers.data.billing import highest, price
from routers.data.catalogue import Member
from routers.data.prompt_cache import Conversation, Sent, estimated_tokens
from routers.environments.protocol import Act, Executor, View

COMPLETION_TOKENS = 50
"""As in the prices of `routers.environments.scripted`."""


def conversation(view: View, member: Member) -> Conversation:
    """An episode as prompt caches see it, for a call of this member: each call's prompt is what every prompt of it
    begins with, the first observation, and all steps before the call."""
    messages = tuple(_prompt(view, member))
    answered = [(i, step) for i, step in enumerate(view.steps) if step.action]
    sent = {step.by: Sent(messages[: 2 + i], step.at) for i, step in answered}  # the last call of each
    return Conversation(sent=sent, last=answered[-1][1].by if answered else None).then(messages, view.now)


def _prompt(view: View, member: Member) -> list[int]:
    """Tokens of what every prompt begins with, the first observation, and each step."""
    steps = (estimated_tokens(step.action) + estimated_tokens(step.observation) for step in view.steps)
    return [member.extra_prompt_tokens, estimated_tokens(view.first), *steps]


class PricedExecutor:
    """An executor at a member's prices.

    Args:
        executor: chooses the actions.
        member: has the executor's name; its prices, cache and ``latency`` count.

    Raises:
        ValueError: another name, or no prices.
    """

    def __init__(self, executor: Executor, member: Member) -> None:
        if member.name != executor.name or not member.priced:
            raise ValueError(f"executor {executor.name!r}: needs a member of its name with price_in and price_out")
        self.name, self.member = executor.name, member
        self._executor = executor

    def bound(self, view: View) -> float:
        return highest(self.member, sum(_prompt(view, self.member)), COMPLETION_TOKENS)

    def caches(self, view: View) -> Conversation:
        return conversation(view, self.member)

    async def act(self, view: View, deadline: float) -> Act:
        act = await self._executor.act(view, deadline)
        usage = self.caches(view).expected(self.member, COMPLETION_TOKENS)
        usd = price(self.member, usage)
        return Act(act.action, usd, replace(act.reply, usage=usage, cost=usd, seconds=self.member.latency or 0.0))
