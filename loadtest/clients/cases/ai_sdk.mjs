// Vercel's AI SDK with @ai-sdk/openai-compatible.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { casesOf } from "./ai_sdk_cases.mjs";
import { MODEL, URL, run } from "./report.mjs";

const provider = createOpenAICompatible({ name: "kvloom", baseURL: URL, apiKey: "none", supportsStructuredOutputs: true });

await run(casesOf(provider(MODEL)));
