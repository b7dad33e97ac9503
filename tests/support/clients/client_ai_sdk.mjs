import { createRequire } from "node:module";
import { run, check, ADDRESS, CAPITAL, PEOPLE, SLOW, WEATHER, KEY } from "./harness.mjs";

const require = createRequire(process.env.SRPO_CLIENTS_NODE + "/");
const { generateText, streamText, Output, tool, isStepCount, stepCountIs } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");
const model = createOpenAICompatible({ name: "srpo", baseURL: ADDRESS, apiKey: KEY, supportsStructuredOutputs: true, includeUsage: true })("router");
const weather = () => ({
  get_weather: tool({ description: "The weather", inputSchema: z.object({ city: z.string() }), execute: async ({ city }) => `sunny in ${city}` }),
});
const stopWhen = (stepCountIs ?? isStepCount)(5);

await run({
  async chat() {
    check((await generateText({ model, prompt: CAPITAL, maxRetries: 0 })).text, "It is Lima.");
  },
  async streaming() {
    let text = "";
    for await (const piece of streamText({ model, prompt: CAPITAL }).textStream) text += piece;
    check(text, "It is Lima.");
  },
  async "tools, several turns"() {
    check((await generateText({ model, prompt: WEATHER, tools: weather(), stopWhen })).text, "Done: sunny in Lima, sunny in Quito");
  },
  async "tools, streamed"() {
    check(await streamText({ model, prompt: WEATHER, tools: weather(), stopWhen }).text, "Done: sunny in Lima, sunny in Quito");
  },
  async "structured output"() {
    const output = Output.object({ schema: z.object({ city: z.string(), people: z.number() }) });
    check((await generateText({ model, prompt: PEOPLE, output })).output, { city: "Lima", people: 11 });
  },
  async async() {
    const replies = await Promise.all(Array.from({ length: 16 }, () => generateText({ model, prompt: CAPITAL })));
    check([...new Set(replies.map((reply) => reply.text))], ["It is Lima."]);
  },
  async cancellation() {
    const stop = new AbortController();
    const { textStream } = streamText({ model, prompt: SLOW, abortSignal: stop.signal, onError() {} });
    try {
      for await (const _ of textStream) { stop.abort(); break; }
    } catch (error) { if (error.name !== "AbortError") throw error; }
  },
});
