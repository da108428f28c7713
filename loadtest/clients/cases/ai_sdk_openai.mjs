// Vercel's AI SDK with @ai-sdk/openai, whose default model speaks of responses.
import { createOpenAI } from "@ai-sdk/openai";
import { casesOf } from "./ai_sdk_cases.mjs";
import { MODEL, URL, run } from "./report.mjs";

await run(casesOf(createOpenAI({ baseURL: URL, apiKey: "none" })(MODEL)));
