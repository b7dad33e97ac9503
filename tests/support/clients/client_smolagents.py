from harness import ADDRESS, CAPITAL, KEY, PEOPLE, SLOW, WEATHER, check, get_weather, run
from smolagents import ChatMessage, OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id="router", api_base=ADDRESS, api_key=KEY)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def user(text):
    return [ChatMessage(role="user", content=[{"type": "text", "text": text}])]


def chat():
    check(model.generate(user(CAPITAL)).content, "It is Lima.")


def stream():
    check("".join(delta.content or "" for delta in model.generate_stream(user(CAPITAL))), "It is Lima.")


def tools():
    agent = ToolCallingAgent(tools=[tool(get_weather)], model=model, max_steps=5, verbosity_level=0)
    check(agent.run(WEATHER), "Done: sunny in Lima, sunny in Quito")


def tools_streamed():
    agent = ToolCallingAgent(
        tools=[tool(get_weather)], model=model, max_steps=5, verbosity_level=0, stream_outputs=True
    )
    check(agent.run(WEATHER), "Done: sunny in Lima, sunny in Quito")


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA, "strict": True}}
    check(model.generate(user(PEOPLE), response_format=form).content, '{"city": "Lima", "people": 11}')


def cancelled():
    pieces = model.generate_stream(user(SLOW))
    next(pieces)
    pieces.close()


run(
    {
        "chat": chat,
        "streaming": stream,
        "tools, several turns": tools,
        "tools, streamed": tools_streamed,
        "structured output": structured,
        "cancellation": cancelled,
    }
)
