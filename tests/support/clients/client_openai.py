import asyncio
import json

from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=ADDRESS, api_key=KEY)
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class People(BaseModel):
    city: str
    people: int


def ask(text, **more):
    return client.chat.completions.create(model="router", messages=[{"role": "user", "content": text}], **more)


def chat():
    reply = ask(CAPITAL, temperature=0.5, max_tokens=50, seed=3)
    check(reply.choices[0].message.content, "It is Lima.")
    check((reply.model, reply.usage.cost_usd > 0, reply.srpo["member"]), ("router", True, "small"))


def stream():
    chunks = list(ask(CAPITAL, stream=True, stream_options={"include_usage": True}))
    check("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), "It is Lima.")
    check(chunks[-1].usage.completion_tokens, 10)


def tools():
    messages = [{"role": "user", "content": WEATHER}]
    for _ in range(5):
        reply = client.chat.completions.create(
            model="router", messages=messages, tools=[{"type": "function", "function": TOOL}], tool_choice="auto"
        )
        message = reply.choices[0].message
        messages.append(message.to_dict())
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            said = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    check(message.content, "Done: sunny in Lima, sunny in Quito")


def tools_streamed():
    with client.chat.completions.stream(
        model="router", messages=[{"role": "user", "content": WEATHER}], tools=[{"type": "function", "function": TOOL}]
    ) as events:
        call = events.get_final_completion().choices[0].message.tool_calls[0]
    check((call.function.name, json.loads(call.function.arguments)), ("get_weather", {"city": "Lima"}))


def structured():
    reply = client.chat.completions.parse(
        model="router", messages=[{"role": "user", "content": PEOPLE}], response_format=People
    )
    check(reply.choices[0].message.parsed, People(city="Lima", people=11))


async def several_at_once():
    async with AsyncOpenAI(base_url=ADDRESS, api_key=KEY) as one:
        message = [{"role": "user", "content": CAPITAL}]
        calls = [one.chat.completions.create(model="router", messages=message) for _ in range(16)]
        replies = await asyncio.gather(*calls)
    check({reply.choices[0].message.content for reply in replies}, {"It is Lima."})


async def cancelled():
    async with AsyncOpenAI(base_url=ADDRESS, api_key=KEY) as one:
        message = [{"role": "user", "content": SLOW}]
        stream = await one.chat.completions.create(model="router", messages=message, stream=True)
        async for _ in stream:
            break
        await stream.close()


def responses():
    check(client.responses.create(model="router", input=CAPITAL).output_text, "It is Lima.")


def responses_streamed():
    with client.responses.stream(model="router", input=CAPITAL) as events:
        check(events.get_final_response().output_text, "It is Lima.")


def models():
    check(next(model.id for model in client.models.list()), "router")


run(
    {
        "chat": chat,
        "streaming": stream,
        "tools, several turns": tools,
        "tools, streamed": tools_streamed,
        "structured output": structured,
        "async": several_at_once,
        "cancellation": cancelled,
        "responses API": responses,
        "responses API, streamed": responses_streamed,
        "models": models,
    }
)
