import asyncio
import json

import litellm
from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from pydantic import BaseModel

TO = {"model": "openai/router", "api_base": ADDRESS, "api_key": KEY}
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class People(BaseModel):
    city: str
    people: int


def user(text):
    return [{"role": "user", "content": text}]


def chat():
    check(litellm.completion(messages=user(CAPITAL), **TO).choices[0].message.content, "It is Lima.")


def stream():
    chunks = list(litellm.completion(messages=user(CAPITAL), stream=True, **TO))
    check("".join(c.choices[0].delta.content or "" for c in chunks), "It is Lima.")


def tools():
    messages = user(WEATHER)
    for _ in range(5):
        reply = litellm.completion(messages=messages, tools=[{"type": "function", "function": TOOL}], **TO)
        message = reply.choices[0].message
        messages.append(message.model_dump())
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            said = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    check(message.content, "Done: sunny in Lima, sunny in Quito")


def tools_streamed():
    given = [{"type": "function", "function": TOOL}]
    chunks = list(litellm.completion(messages=user(WEATHER), tools=given, stream=True, **TO))
    call = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0]
    check((call.function.name, json.loads(call.function.arguments)), ("get_weather", {"city": "Lima"}))


def structured():
    reply = litellm.completion(messages=user(PEOPLE), response_format=People, **TO)
    check(People.model_validate_json(reply.choices[0].message.content), People(city="Lima", people=11))


async def several_at_once():
    replies = await asyncio.gather(*(litellm.acompletion(messages=user(CAPITAL), **TO) for _ in range(16)))
    check({reply.choices[0].message.content for reply in replies}, {"It is Lima."})


async def cancelled():
    async def read():
        async for _ in await litellm.acompletion(messages=user(SLOW), stream=True, **TO):
            begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})


run(
    {
        "chat": chat,
        "streaming": stream,
        "tools, several turns": tools,
        "tools, streamed": tools_streamed,
        "structured output": structured,
        "async": several_at_once,
        "cancellation": cancelled,
    }
)
