"""litellm."""

import json

import litellm
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, TOOL_CHOICE, URL, WEATHER, require, run

SAID = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "max_tokens": MAX_TOKENS, "temperature": 0}
HELLO, USER = [{"role": "user", "content": "Say hello."}], [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


def text():
    require(litellm.completion(messages=HELLO, **SAID).choices[0].message.content, "the answer is empty")


def stream():
    chunks = litellm.completion(messages=HELLO, stream=True, **SAID)
    require("".join(chunk.choices[0].delta.content or "" for chunk in chunks), "the answer is empty")


def tools():
    message = litellm.completion(messages=USER, tools=[WEATHER], tool_choice=TOOL_CHOICE, **SAID).choices[0].message
    require(json.loads(message.tool_calls[0].function.arguments)["city"], "no city")


def tools_streamed():
    chunks = list(litellm.completion(messages=USER, tools=[WEATHER], tool_choice=TOOL_CHOICE, stream=True, **SAID))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    require(json.loads(message.tool_calls[0].function.arguments)["city"], "no city")


def structured():
    asked = [{"role": "user", "content": "Describe the city of Bonn."}]
    reply = litellm.completion(messages=asked, response_format=City, **SAID)
    City.model_validate_json(reply.choices[0].message.content)


def errors():
    """A prompt beyond the context is what litellm falls back to a larger model for, on either API."""
    anthropic = {**SAID, "model": f"anthropic/{MODEL}", "api_base": URL.removesuffix("/v1")}
    for said in (SAID, anthropic):
        try:
            litellm.completion(messages=[{"role": "user", "content": "word " * 100_000}], **said)
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError(f"{said['model']}: ContextWindowExceededError is not raised")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured,
     "errors": errors})  # fmt: skip
