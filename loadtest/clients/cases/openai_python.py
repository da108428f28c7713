"""openai-python."""

import json

from openai import OpenAI
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, WEATHER, require, run

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
SAID = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0}
USER = {"role": "user", "content": QUESTION}


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


def text():
    reply = client.chat.completions.create(messages=[{"role": "user", "content": "Say hello."}], **SAID)
    require(reply.choices[0].message.content, "the answer is empty")


def stream():
    chunks = client.chat.completions.create(messages=[{"role": "user", "content": "Say hello."}], stream=True, **SAID)
    require("".join(chunk.choices[0].delta.content or "" for chunk in chunks), "the answer is empty")


def tools():
    """A loop: the call, its result, the answer."""
    reply = client.chat.completions.create(messages=[USER], tools=[WEATHER], tool_choice=TOOL_CHOICE, **SAID)
    message = reply.choices[0].message
    require(reply.choices[0].finish_reason == "tool_calls", f"finish_reason is {reply.choices[0].finish_reason}")
    for call in message.tool_calls:
        require(call.function.name == "get_weather" and json.loads(call.function.arguments)["city"], "another call")
    results = [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in message.tool_calls]
    final = client.chat.completions.create(messages=[USER, message, *results], tools=[WEATHER], tool_choice="none", **SAID)
    require(final.choices[0].message.content, "no answer after the result")


def tools_streamed():
    with client.chat.completions.stream(messages=[USER], tools=[WEATHER], tool_choice=TOOL_CHOICE, **SAID) as events:
        pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        message = events.get_final_completion().choices[0].message
    require(pieces and json.loads(message.tool_calls[0].function.arguments)["city"], "no pieces of arguments")


def structured():
    asked = [{"role": "user", "content": "Describe the city of Bonn."}]
    reply = client.chat.completions.parse(messages=asked, response_format=City, **SAID)
    require(isinstance(reply.choices[0].message.parsed, City), "no object")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured})
