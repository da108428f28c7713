// openai-js.
import OpenAI from "openai";
import { MAX_TOKENS, MODEL, QUESTION, TOOL_CHOICE, URL, require, run } from "./report.mjs";

const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const said = { model: MODEL, max_tokens: MAX_TOKENS, temperature: 0 };
const hello = [{ role: "user", content: "Say hello." }];
const parameters = { type: "object", properties: { city: { type: "string", maxLength: 40 } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "Current weather of a city.", parameters } }];
const user = { role: "user", content: QUESTION };
const schema = {
  type: "object", properties: { name: { type: "string" }, inhabitants: { type: "integer", minimum: 0, maximum: 100000000 } },
  required: ["name", "inhabitants"], additionalProperties: false,
};

await run({
  text: async () => {
    const reply = await client.chat.completions.create({ ...said, messages: hello });
    require(reply.choices[0].message.content, "the answer is empty");
  },
  stream: async () => {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...said, messages: hello, stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    require(text, "the answer is empty");
  },
  tools: async () => {
    const reply = await client.chat.completions.create({ ...said, messages: [user], tools, tool_choice: TOOL_CHOICE });
    const message = reply.choices[0].message;
    require(JSON.parse(message.tool_calls[0].function.arguments).city, "no city");
    const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: "Rain." }));
    const messages = [user, message, ...results];
    const final = await client.chat.completions.create({ ...said, messages, tools, tool_choice: "none" });
    require(final.choices[0].message.content, "no answer after the result");
  },
  "tools streamed": async () => {
    const stream = client.chat.completions.stream({ ...said, messages: [user], tools, tool_choice: TOOL_CHOICE });
    const message = (await stream.finalChatCompletion()).choices[0].message;
    require(JSON.parse(message.tool_calls[0].function.arguments).city, "no city");
  },
  structured: async () => {
    const format = { type: "json_schema", json_schema: { name: "city", strict: true, schema } };
    const messages = [{ role: "user", content: "Describe the city of Bonn." }];
    const reply = await client.chat.completions.parse({ ...said, messages, response_format: format });
    require(JSON.parse(reply.choices[0].message.content).name !== undefined, "no object");
  },
});
