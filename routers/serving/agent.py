"""A think/route agent behind chat requests: a conversation becomes its question, its last answer the reply.

The agent learned to answer one question, so one message of the user is its question as it is. Of a longer conversation
it reads, with what is missing left out,

    Instructions:
    ... the system messages ...

    Conversation so far:
    User: ...
    Assistant: ...

    Question:
    ... the last message, which is the user's ...

What the policy writes on the way is ``reasoning_content``, a turn at a time in a stream; the answer is ``content``.
``prompt_tokens`` and ``completion_tokens`` are the policy's own, ``usage.cost_usd`` is everything, ``srpo.members``
says who was asked. Temperature, top_p and seed are those of the policy's tokens; ``max_tokens`` limits its turns and
what it reads in between; ``stop`` cuts the answer. An agent that comes to no answer is an error that says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from routers.data.billing import shown_usd
from routers.pool.request import longest_of
from routers.router import Answer
from routers.serving.chat import ChatRequest, refuse_others, text_of
from routers.serving.errors import RequestError
from routers.serving.fields import AGENT_FIELDS
from routers.serving.metrics import ServerMetrics
from routers.serving.served import Served, Spent, Text, counted, new_head
from srpo.texts import well_formed
from srpo.types import Usage

_WHO = "a think/route agent"


def question_of(messages: Sequence[dict[str, Any]]) -> str:
    """The question that a conversation is to an agent; see the module.

    Raises:
        RequestError: messages that no such agent was trained on, or none of the user's at the end.
    """
    told: list[str] = []
    for place, message in enumerate(messages):
        here = f"messages[{place}]"
        for name, value in message.items():
            if name not in ("role", "content", "refusal") and value is not None:
                raise RequestError(400, f"{_WHO} does not take {here}.{name}", here, "unsupported_parameter")
        if message["role"] not in ("system", "developer", "user", "assistant"):
            words = f"{here}: {_WHO} has no tools, so the role {message['role']!r} is not for it"
            raise RequestError(400, words, f"{here}.role", "unsupported_parameter")
    *before, last = messages
    if last["role"] != "user" or not text_of(last).strip():
        raise RequestError(400, "the last message must be the user's question", "messages", "invalid_value")
    systems = [text_of(m) for m in before if m["role"] in ("system", "developer") and text_of(m).strip()]
    turns = [f"{m['role'].capitalize()}: {text_of(m)}" for m in before if m["role"] in ("user", "assistant")]
    if systems:
        told += ["Instructions:\n" + "\n\n".join(systems)]
    if turns:
        told += ["Conversation so far:\n" + "\n".join(turns)]
    question = text_of(last)
    return well_formed("\n\n".join([*told, f"Question:\n{question}"]) if told else question)


class _Cost:
    """Of an agent's answer, once it is there."""

    usd = 0.0


class AgentWorker:
    """Serves a `RouterAgent`. Closes it.

    Args:
        agent: who answers.
        name: as clients say it.
    """

    queues = False

    def __init__(self, agent: Any, name: str = "router") -> None:
        self.agent, self.name = agent, name
        self.metrics = ServerMetrics()
        self.count_tokens = agent.count_tokens
        if agent.pool is not None:
            self.metrics.follow(agent.pool.ledger)

    def reads(self, asked: ChatRequest) -> Text:
        refuse_others(asked, AGENT_FIELDS, _WHO)
        if asked.body.get("n", 1) != 1:
            raise RequestError(400, f"{_WHO} gives one answer: 'n' must be 1", "n", "unsupported_parameter")
        return Text(question_of(asked.messages))

    @asynccontextmanager
    async def serve(self, asked: ChatRequest, read: Text, spent: Spent) -> AsyncIterator[Served]:
        cost, loop = _Cost(), asyncio.get_running_loop()
        spent.call = cost
        turns: asyncio.Queue[str | None] = asyncio.Queue()

        def told(text: str) -> None:
            loop.call_soon_threadsafe(turns.put_nowait, text)

        answering = asyncio.ensure_future(self._answer(read.text, asked, cost, spent, told))
        answering.add_done_callback(lambda _: turns.put_nowait(None))
        try:
            if asked.stream:
                first = await turns.get()
                if first is None:
                    await answering  # an error before the first turn has a status of its own
                yield Served(chunks=self._chunks(first, turns, answering, asked))
            else:
                found = await answering
                headers = {"x-srpo-cost-usd": f"{shown_usd(found.cost_usd)}"}
                yield Served(headers, document=self._document(found, asked))
        finally:
            answering.cancel()  # of a client that left: nobody asks further members on its behalf
            await asyncio.wait({answering})

    async def _answer(self, question: str, asked: ChatRequest, cost: _Cost, spent: Spent, told: Any) -> Answer:
        spent.known = False
        try:
            found = await self.agent.aanswer(
                question, asked.max_cost_usd, cost_weight=asked.cost_weight, on_turn=told, drawing=_drawing(asked)
            )
        except ValueError as error:
            raise RequestError(400, str(error), None, "invalid_value") from None
        cost.usd, spent.known = found.cost_usd, True
        spent.told = {"member": ", ".join(found.members) or None}
        self.metrics.answered(found)
        if found.answer is None or not found.answer.strip():
            raise _no_answer(found)
        return found

    def _document(self, found: Answer, asked: ChatRequest) -> dict[str, Any]:
        message = {"role": "assistant", "content": _cut(found, asked), "reasoning_content": _transcript(found)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = new_head("chat.completion", self.name)
        return {**head, "choices": [choice], "usage": _usage(found), "srpo": _srpo(found)}

    async def _chunks(
        self, turn: str | None, turns: asyncio.Queue[str | None], answering: asyncio.Future[Answer], asked: ChatRequest
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        head = new_head("chat.completion.chunk", self.name)
        more = {"usage": None} if asked.include_usage else {}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}

        yield chunk({"role": "assistant", "content": ""})
        while turn is not None:
            yield chunk({"reasoning_content": turn})
            turn = await turns.get()
        found = await answering
        yield chunk({"content": _cut(found, asked)})
        yield chunk({}, "stop")
        if asked.include_usage:
            yield {**head, "choices": [], "usage": _usage(found), "srpo": _srpo(found)}

    async def aclose(self) -> None:
        await self.agent.aclose()


def _drawing(asked: ChatRequest) -> Any:
    """How the request wants its answer to be drawn."""
    from routers.tasks.think_route.drawing import Drawing  # imports torch, which a proxy may do without

    how = {name: asked.body.get(name) for name in ("temperature", "top_p", "seed")}
    return Drawing(**how, tokens=longest_of(asked.body))


def _no_answer(found: Answer) -> RequestError:
    """Why there is none, in words, by how the episode ended."""
    if found.stop == "lost":
        status, words, code = 502, f"the pool failed: {found.error}", "pool_error"
    elif found.stop == "budget":
        status, words, code = 402, "the agent came to no answer within max_cost_usd", "over_budget"
    elif found.stop == "deadline":
        status, words, code = 504, "the agent came to no answer in time", "deadline"
    elif found.stop in ("turns", "tokens"):
        status, words, code = 422, f"the agent came to no answer within its limit of {found.stop}", "no_answer"
    else:
        status, words, code = 422, "the agent ended without an answer", "no_answer"
    return RequestError(status, words, "max_cost_usd" if status == 402 else None, code, srpo=_srpo(found))


def _cut(found: Answer, asked: ChatRequest) -> str:
    """The answer up to the first of the request's stop texts."""
    text, stop = found.answer or "", asked.body.get("stop") or []
    for end in [stop] if isinstance(stop, str) else stop:
        text = text.partition(end)[0]
    return text


def _transcript(found: Answer) -> str:
    return "".join(text for owner, text in found.turns if owner == "policy")


def _usage(found: Answer) -> dict[str, Any]:
    return {**counted(Usage(found.prompt_tokens, found.completion_tokens)), "cost_usd": shown_usd(found.cost_usd)}


def _srpo(found: Answer) -> dict[str, Any]:
    return {"members": list(found.members), "stop": found.stop, "cost_usd": shown_usd(found.cost_usd)}
