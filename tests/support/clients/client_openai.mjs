import { createRequire } from "node:module";
import { run, check, ADDRESS, CAPITAL, PEOPLE, SLOW, WEATHER, KEY } from "./harness.mjs";

const require = createRequire(process.env.SRPO_CLIENTS_NODE + "/");
const OpenAI = require("openai").default ?? require("openai");
const client = new OpenAI({ baseURL: ADDRESS, apiKey: KEY });
const TOOLS = [{ type: "function", function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } } }];
const user = (text) => [{ role: "user", content: text }];

await run({
  async chat() {
    const reply = await client.chat.completions.create({ model: "router", messages: user(CAPITAL), max_tokens: 50 });
    check([reply.choices[0].message.content, reply.model, reply.usage.cost_usd > 0], ["It is Lima.", "router", true]);
  },
  async streaming() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model: "router", messages: user(CAPITAL), stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
    check(text, "It is Lima.");
  },
  async "tools, several turns"() {
    const runner = client.chat.completions.runTools({
      model: "router", messages: user(WEATHER),
      tools: [{ type: "function", function: { ...TOOLS[0].function, parse: JSON.parse, function: ({ city }) => `sunny in ${city}` } }],
    });
    check(await runner.finalContent(), "Done: sunny in Lima, sunny in Quito");
  },
  async "tools, streamed"() {
    const done = await client.chat.completions.stream({ model: "router", messages: user(WEATHER), tools: TOOLS }).finalChatCompletion();
    check(JSON.parse(done.choices[0].message.tool_calls[0].function.arguments), { city: "Lima" });
  },
  async "structured output"() {
    const schema = { type: "object", properties: { city: { type: "string" }, people: { type: "integer" } }, required: ["city", "people"], additionalProperties: false };
    const reply = await client.chat.completions.parse({ model: "router", messages: user(PEOPLE), response_format: { type: "json_schema", json_schema: { name: "people", schema, strict: true } } });
    check(JSON.parse(reply.choices[0].message.content), { city: "Lima", people: 11 });
  },
  async async() {
    const replies = await Promise.all(Array.from({ length: 16 }, () => client.chat.completions.create({ model: "router", messages: user(CAPITAL) })));
    check([...new Set(replies.map((reply) => reply.choices[0].message.content))], ["It is Lima."]);
  },
  async cancellation() {
    const stream = await client.chat.completions.create({ model: "router", messages: user(SLOW), stream: true });
    for await (const _ of stream) break;
    stream.controller.abort();
  },
  async "responses API"() {
    check((await client.responses.create({ model: "router", input: CAPITAL })).output_text, "It is Lima.");
  },
});
