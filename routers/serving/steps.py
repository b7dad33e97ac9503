"""A step router in front of its members: each call of an agent's loop is one decision, under a conversation's budget.

Whose conversation a call belongs to says the header ``x-srpo-conversation`` or ``metadata.conversation_id``, else its
messages (`routers.tasks.step_routing.conversations`); the id of either comes back in the reply's header. Two clients'
keys never share one. ``srpo`` says, beside what a query router's does,

    reason                  policy, sticky or failover
    conversation, number    its id, and which of its calls this is
    spent_usd, remaining    of it: by the calls before this one, and what is left of the budget (null: no limit) while
                            this one is set aside

A call that no member may answer within the budget is 402. A member that fails is replaced by the likeliest that still
fits; what may have been billed all the same counts in the budget.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

from routers.data.billing import shown_usd
from routers.language.digest import Digest, digest
from routers.pool import Ledger
from routers.pool.call import Declined, Failed
from routers.pool.protocol import OVER_BUDGET
from routers.serving.chat import ChatRequest
from routers.serving.errors import RequestError
from routers.serving.front import Front, Line, Reply
from routers.serving.gate import current_ticket
from routers.serving.served import Served, Spent
from routers.tasks.step_routing.conversations import Call, Conversations

LEFT = "the client left"


class StepProxy(Front):
    """Serves a step router. Closes router and lines.

    Args:
        conversations: decide; their router is closed.
        lines: the way to each member of the router, by name.
        ledger: where the policy's own tokens are booked.
        name: of the router, as clients say it.
    """

    queues = True  # decisions meet in the router's batches

    def __init__(
        self,
        conversations: Conversations,
        lines: Mapping[str, Line],
        ledger: Ledger,
        name: str = "router",
    ) -> None:
        super().__init__(lines, ledger, name)
        self.conversations = conversations
        self.router = cast(Any, conversations.router)
        self.count_tokens = self.router.count_tokens

    def reads(self, asked: ChatRequest) -> Digest:
        return digest(asked.messages, asked.body.get("tools"))

    @asynccontextmanager
    async def serve(self, asked: ChatRequest, read: Digest, spent: Spent) -> AsyncIterator[Served]:
        asked = asked.without_conversation()
        call = await self._decided(asked, read, spent)
        spent.policy_usd = self.ledger.policy(call.prompt_tokens, call.completion_tokens)
        turn = _Turn(self.conversations, call)
        spent.told = turn.told
        if call.member is None:
            raise self._nobody(turn, spent)
        async with AsyncExitStack() as stack:
            stack.callback(turn.left)  # whatever happens, the call is settled once
            spent.call = turn.reply = reply = await self._answering(stack, asked, turn, spent)
            more = {"x-srpo-conversation": call.conversation}
            yield self.served(reply, asked, turn.told, spent, turn.over, more)

    async def _decided(self, asked: ChatRequest, read: Digest, spent: Spent) -> Call:
        refusals = {name: line.refusal(asked.body) for name, line in self.lines.items()}
        bounds = {name: line.bound(asked.body) for name, line in self.lines.items()}
        able = [name for name, why in refusals.items() if why is None]
        fitting = [name for name in able if bounds[name] <= asked.cap]
        if not fitting:
            why: Any = next((why for why in refusals.values() if why and not able), None)
            least = min((bounds[name] for name in able), default=0.0)
            words = f"a call costs at most {least:.6g} USD, and {asked.cap:.6g} USD are left"
            why = why or Declined(OVER_BUDGET, words)
            raise self.without_reply(why, {"member": None, "scores": {}, "tried": []}, spent)
        ticket = current_ticket()
        try:
            return await self.conversations.decide(
                asked.messages,
                asked.body.get("tools"),
                owner=ticket.key.name if ticket else "",
                conversation=asked.conversation,
                bounds=bounds,
                among=fitting,
                read=read,
            )
        except ValueError as error:
            raise RequestError(400, str(error), "messages", "invalid_value") from None

    async def _answering(self, stack: AsyncExitStack, asked: ChatRequest, turn: _Turn, spent: Spent) -> Reply:
        """The reply of the member that was chosen, or of the next likeliest one that answers."""
        failed: Failed | Declined | None = None
        while turn.call.member is not None:
            line = self.lines[turn.call.member]
            try:
                return await self.reply_of(line, asked, spent, stack)
            except Declined as error:
                failed = failed or error
                turn.instead(str(error), None, 0.0)
            except Failed as error:
                spent.failed_usd += error.usd
                usd = None if error.unmetered else error.usd
                if not error.elsewhere:
                    turn.over(error.words, usd, error.status)
                    raise self.without_reply(error, turn.told, spent) from None
                failed = failed if isinstance(failed, Failed) else error
                turn.instead(error.words, error.status, usd)
        raise self.without_reply(failed, turn.told, spent)

    def _nobody(self, turn: _Turn, spent: Spent) -> RequestError:
        words = f"the budget of conversation {turn.call.conversation} has no room for another call"
        headers = {"x-srpo-conversation": turn.call.conversation}
        return RequestError(402, words, None, "over_budget", headers, srpo=self.costs(turn.told, spent))

    async def aclose(self) -> None:
        await self.router.aclose()
        await super().aclose()
        self.conversations.close()


class _Turn:
    """One call of an agent: who answers it, and that it is settled exactly once."""

    def __init__(self, conversations: Conversations, call: Call) -> None:
        self._conversations = conversations
        self._settled = call.member is None
        self.call = call
        self.reply: Reply | None = None
        self.told: dict[str, Any] = {"member": None, "scores": dict(call.scores), "tried": []}
        self._tell()

    def _tell(self) -> None:
        call = self.call
        self.told |= {"member": call.member, "reason": call.reason, "conversation": call.conversation}
        self.told |= {"number": call.number, "spent_usd": shown_usd(call.spent_usd)}
        self.told["remaining"] = shown_usd(call.remaining) if math.isfinite(call.remaining) else None

    def instead(self, error: str, status: int | None, usd: float | None) -> None:
        """The member failed, or was not asked: somebody else, or nobody."""
        self._failed(error, status)
        self.call = self._conversations.instead(self.call, error, usd)
        self._settled = self.call.member is None
        self._tell()

    def over(self, error: str | None, usd: float | None = None, status: int | None = None) -> None:
        """The call is over; it cost what its reply did, or what is said."""
        if status is not None:
            self._failed(str(error), status)
        if not self._settled:
            self._settled = True
            paid = self.reply.usd if self.reply is not None else usd
            self._conversations.settle(self.call, paid, error)

    def _failed(self, error: str, status: int | None) -> None:
        more = {} if status is None else {"status": status}
        self.told["tried"].append({"member": self.call.member, "error": error, **more})

    def left(self) -> None:
        """Nobody waits for it any more: where nothing had come, it may have cost all that was set aside."""
        self.over(LEFT)
