import asyncio

from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model="router", base_url=ADDRESS, api_key=KEY)


class People(BaseModel):
    city: str
    people: int


def chat():
    check(model.invoke(CAPITAL).content, "It is Lima.")


def stream():
    check("".join(chunk.content for chunk in model.stream(CAPITAL)), "It is Lima.")


def tools():
    bound, messages = model.bind_tools([get_weather]), [HumanMessage(WEATHER)]
    for _ in range(5):
        reply = bound.invoke(messages)
        messages.append(reply)
        if not reply.tool_calls:
            break
        messages += [ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]) for call in reply.tool_calls]
    check(reply.content, "Done: sunny in Lima, sunny in Quito")


def tools_streamed():
    whole = None
    for chunk in model.bind_tools([get_weather]).stream(WEATHER):
        whole = chunk if whole is None else whole + chunk
    check([(call["name"], call["args"]) for call in whole.tool_calls], [("get_weather", {"city": "Lima"})])


def structured():
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(People, method=method).invoke(PEOPLE)
        check(found, People(city="Lima", people=11))


async def several_at_once():
    replies = await asyncio.gather(*(model.ainvoke(CAPITAL) for _ in range(16)))
    check({reply.content for reply in replies}, {"It is Lima."})


async def cancelled():
    """By closing the stream: langchain-openai 1.7 ignores that its task is cancelled, whatever server it talks to."""
    pieces = model.astream(SLOW)
    async for _ in pieces:
        break
    await pieces.aclose()


def responses():
    reply = ChatOpenAI(model="router", base_url=ADDRESS, api_key=KEY, use_responses_api=True).invoke(CAPITAL)
    check(reply.text if isinstance(reply.text, str) else reply.text(), "It is Lima.")


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
