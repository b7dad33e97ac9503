"""openai-agents."""

import asyncio

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class People(BaseModel):
    city: str
    people: int


def agent(model=OpenAIChatCompletionsModel, **more):
    client = AsyncOpenAI(base_url=ADDRESS, api_key=KEY)
    return Agent(name="asker", instructions="Answer.", model=model(model="router", openai_client=client), **more)


def chat():
    check(Runner.run_sync(agent(), CAPITAL).final_output, "It is Lima.")


async def stream():
    result, texts = Runner.run_streamed(agent(), CAPITAL), []
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            texts.append(event.data.delta)
    check(("".join(texts), result.final_output), ("It is Lima.", "It is Lima."))


def tools():
    found = Runner.run_sync(agent(tools=[function_tool(get_weather)]), WEATHER).final_output
    check(found, "Done: sunny in Lima, sunny in Quito")


async def tools_streamed():
    result = Runner.run_streamed(agent(tools=[function_tool(get_weather)]), WEATHER)
    async for _ in result.stream_events():
        pass
    check(result.final_output, "Done: sunny in Lima, sunny in Quito")


def structured():
    check(Runner.run_sync(agent(output_type=People), PEOPLE).final_output, People(city="Lima", people=11))


async def several_at_once():
    results = await asyncio.gather(*(Runner.run(agent(), CAPITAL) for _ in range(16)))
    check({result.final_output for result in results}, {"It is Lima."})


async def cancelled():
    result = Runner.run_streamed(agent(), SLOW)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            result.cancel()


def responses():
    found = Runner.run_sync(agent(OpenAIResponsesModel, tools=[function_tool(get_weather)]), WEATHER).final_output
    check(found, "Done: sunny in Lima, sunny in Quito")


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
    }
)
