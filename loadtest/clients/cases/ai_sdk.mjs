// Vercel's AI SDK with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { MAX_TOKENS, MODEL, QUESTION, TOOL_CHOICE, URL, require, run } from "./report.mjs";

const provider = createOpenAICompatible({ name: "kvloom", baseURL: URL, apiKey: "none", supportsStructuredOutputs: true });
const said = { model: provider(MODEL), maxOutputTokens: MAX_TOKENS, temperature: 0, maxRetries: 0 };
const tools = {
  get_weather: tool({
    description: "Current weather of a city.",
    inputSchema: z.object({ city: z.string().max(40) }),
    execute: async () => "Rain, 12 degrees.",
  }),
};
const asked = { ...said, tools, toolChoice: TOOL_CHOICE, prompt: QUESTION };

await run({
  text: async () => require((await generateText({ ...said, prompt: "Say hello." })).text, "the answer is empty"),
  stream: async () => {
    let text = "";
    for await (const piece of streamText({ ...said, prompt: "Say hello." }).textStream) text += piece;
    require(text, "the answer is empty");
  },
  tools: async () => {
    const result = await generateText(asked);
    require(result.toolCalls[0].input.city && result.toolResults.length, "no call");
  },
  "tools streamed": async () => {
    const result = streamText(asked);
    await result.consumeStream();
    require((await result.toolCalls)[0].input.city, "no call");
  },
  structured: async () => {
    const schema = z.object({ name: z.string().max(40), inhabitants: z.number().int().min(0).max(100_000_000) });
    const { object } = await generateObject({ ...said, schema, prompt: "Describe the city of Bonn." });
    require(object.name !== undefined, "no object");
  },
});
