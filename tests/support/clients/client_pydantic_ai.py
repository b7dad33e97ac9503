import asyncio

from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class People(BaseModel):
    city: str
    people: int


def agent(kind=OpenAIChatModel, **more):
    return Agent(kind("router", provider=OpenAIProvider(base_url=ADDRESS, api_key=KEY)), **more)


def chat():
    check(agent().run_sync(CAPITAL).output, "It is Lima.")


async def stream():
    async with agent().run_stream(CAPITAL) as result:
        texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
    check("".join(texts), "It is Lima.")


def tools():
    check(agent(tools=[get_weather]).run_sync(WEATHER).output, "Done: sunny in Lima, sunny in Quito")


async def tools_streamed():
    async with agent(tools=[get_weather]).run_stream(WEATHER) as result:
        check(await result.get_output(), "Done: sunny in Lima, sunny in Quito")


def structured():
    for kind in (NativeOutput(People), People):  # by response_format, and by a tool
        check(agent(output_type=kind).run_sync(PEOPLE).output, People(city="Lima", people=11))


async def several_at_once():
    one = agent()
    results = await asyncio.gather(*(one.run(CAPITAL) for _ in range(16)))
    check({result.output for result in results}, {"It is Lima."})


async def cancelled():
    async def read():
        async with agent().run_stream(SLOW) as result:
            async for _ in result.stream_text(delta=True, debounce_by=None):
                begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})


def responses():
    check(agent(OpenAIResponsesModel).run_sync(CAPITAL).output, "It is Lima.")


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
