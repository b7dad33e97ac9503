"""Executors of agents that speak messages: they answer the whole request, and their price knows the prompt caches."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from routers.data.billing import highest, price
from routers.data.catalogue import Member
from routers.data.prompt_cache import Conversation, estimated_messages, tokens_of
from routers.environments.messages.environment import MessagesEnvironment, answer
from routers.environments.protocol import Act, GameError, View
from routers.pool.call import Declined, Failed
from routers.pool.ledger import Ledger
from routers.pool.passthrough import Passthrough
from routers.pool.protocol import BAD_REQUEST, MALFORMED, RATE_LIMIT, SERVER_ERROR, TIMEOUT
from routers.pool.request import refusal, request_of
from srpo.types import Reply, Usage

_OURS = ("model", "stream", "stream_options")


class ScriptedMember(ABC):
    """SCRIPTED. Answers by `say`; pays for the tokens of its prompt, by what its cache holds of it, and of its reply.

    Args:
        member: its prices and the rules of its cache.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.name = member.name

    def bound(self, view: View) -> float:
        return highest(self.member, self.caches(view).prompt_tokens, self.member.max_tokens)

    def caches(self, view: View) -> Conversation:
        return _world(view).caches

    @abstractmethod
    def say(self, request: Mapping[str, Any], seed: str) -> dict[str, Any]:
        """The assistant's message; `seed` names its dice."""

    async def act(self, view: View, deadline: float) -> Act:
        world = _world(view)
        message = self.say(world.request, f"{self.name}/{view.seed}/{world.steps}")
        written = min(sum(map(tokens_of, estimated_messages([message]))), self.member.max_tokens)
        usage = world.caches.expected(self.member, written)
        usd = price(self.member, usage)
        return Act(answer(self.name, message), usd, Reply(str(message.get("content") or ""), usage, usd))


class LiveMember:
    """A member behind an OpenAI-compatible endpoint: gets the agent's request as it is, one attempt, and is paid for
    what it reports, cached prompts too. A call that failed is an empty action and `Reply.error`.

    Args:
        member: with `base_url` and prices.
        ledger: where calls are booked.

    Raises:
        ValueError: as `Passthrough`.
    """

    def __init__(self, member: Member, ledger: Ledger) -> None:
        self.member = member
        self.name = member.name
        self._ledger = ledger
        Passthrough(member, ledger)
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Passthrough] = WeakKeyDictionary()

    def caches(self, view: View) -> Conversation:
        return _world(view).caches

    def bound(self, view: View, longer: float = 1.0) -> float:
        """As `Executor.bound`; `longer`: for a prompt of so many times its length."""
        request = request_of(self.member, _fields(view), stream=False)
        return highest(self.member, math.ceil(longer * request.prompt_bound), request.completion_bound)

    async def act(self, view: View, deadline: float) -> Act:
        fields, loop = _fields(view), asyncio.get_running_loop()
        if no := refusal(self.member, fields):
            return _failed(f"{BAD_REQUEST}: {no.words}", 0.0)
        there = self._by_loop.setdefault(loop, Passthrough(self.member, self._ledger))
        call = None
        try:
            async with asyncio.timeout(deadline), there.call(fields) as call:
                message = (call.document or {})["choices"][0]["message"]
        except Declined as error:
            return _failed(str(error), 0.0)
        except Failed as error:
            kind = RATE_LIMIT if error.status == 429 else SERVER_ERROR if error.status >= 500 else BAD_REQUEST
            return _failed(f"{kind}: {error.status}: {error}", error.usd)
        except TimeoutError:
            return _failed(f"{TIMEOUT}: no reply in {deadline:g} s", self.bound(view))
        except (LookupError, TypeError):
            return _failed(f"{MALFORMED}: no message in the reply", 0.0 if call is None else call.usd)
        text = message.get("content") if isinstance(message, Mapping) else None
        return Act(answer(self.name, message), call.usd, Reply(str(text or ""), call.usage, call.usd))


def _failed(why: str, usd: float) -> Act:
    return Act("", usd, Reply("", Usage(usd=usd), usd, why))


def _fields(view: View) -> dict[str, Any]:
    """What of an agent's request goes to a member."""
    return {name: value for name, value in _world(view).request.items() if name not in _OURS}


def _world(view: View) -> MessagesEnvironment:
    if not isinstance(view.environment, MessagesEnvironment):
        raise GameError(f"{view.environment.seed}: this executor answers agents that speak messages, no other games")
    return view.environment
