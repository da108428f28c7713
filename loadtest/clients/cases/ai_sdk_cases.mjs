// Vercel's AI SDK: what is asked through each of its providers.
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { MAX_TOKENS, QUESTION, TOOL_CHOICE, require } from "./report.mjs";

export function casesOf(model) {
  const said = { model, maxOutputTokens: MAX_TOKENS, temperature: 0, maxRetries: 0 };
  const tools = {
    get_weather: tool({
      description: "Current weather of a city.",
      inputSchema: z.object({ city: z.string().max(40) }),
      execute: async () => "Rain, 12 degrees.",
    }),
  };
  const asked = { ...said, tools, toolChoice: TOOL_CHOICE, prompt: QUESTION };

  return {
    text: async () => require((await generateText({ ...said, prompt: "Say hello." })).text, "the answer is empty"),
    stream: async () => {
      let text = "";
      for await (const piece of streamText({ ...said, prompt: "Say hello." }).textStream) text += piece;
      require(text, "the answer is empty");
    },
    tools: async () => {
      const prepareStep = ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {});
      const { steps, text } = await generateText({ ...asked, stopWhen: stepCountIs(2), prepareStep });
      require(steps[0].toolCalls[0].input.city && steps.length === 2 && text, "no call, or no answer after the result");
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
  };
}
