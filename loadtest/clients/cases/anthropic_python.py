"""anthropic's SDK, which sends its key as x-api-key."""

from typing import Literal

import anthropic
from pydantic import BaseModel
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, WEATHER, require, run

BASE = URL.removesuffix("/v1")
client = anthropic.Anthropic(base_url=BASE, api_key=KEY, max_retries=0)
SAID = {"model": MODEL, "max_tokens": MAX_TOKENS}
HELLO = [{"role": "user", "content": "Say hello."}]
USER = {"role": "user", "content": QUESTION}
LOOK = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}
CHOICE = {"type": {"required": "any"}.get(TOOL_CHOICE, TOOL_CHOICE), "disable_parallel_tool_use": True}


class Place(BaseModel):
    """Without bounds, which the SDK takes out of a schema before it is sent."""

    kind: Literal["city", "village"]
    capital: bool


def text():
    system = [{"type": "text", "text": "Be polite.", "cache_control": {"type": "ephemeral"}}]
    reply = client.messages.create(messages=HELLO, system=system, **SAID)
    require(reply.content[0].text and reply.stop_reason in ("end_turn", "max_tokens"), "the answer is empty")
    require(reply._request_id and reply.usage.output_tokens > 0, "no request id")


def stream():
    with client.messages.stream(messages=HELLO, **SAID) as events:
        pieces = list(events.text_stream)
        final = events.get_final_message()
    require("".join(pieces) and final.content[0].text == "".join(pieces), "the answer is empty")
    require(final.usage.output_tokens >= len(pieces) > 1, "the answer came in one piece")


def calls_of(message):
    require(message.stop_reason == "tool_use", f"stop_reason is {message.stop_reason}")
    calls = [block for block in message.content if block.type == "tool_use"]
    require(calls and all(call.name == "get_weather" and call.input["city"] for call in calls), "another call")
    return [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT} for call in calls]


def answered(message):
    """The answer after the results of its calls."""
    history = [USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": calls_of(message)}]
    return {"messages": history, "tools": [LOOK], "tool_choice": {"type": "none"}, **SAID}


def tools():
    message = client.messages.create(messages=[USER], tools=[LOOK], tool_choice=CHOICE, **SAID)
    require(client.messages.create(**answered(message)).content[0].text, "no answer after the result")


def tools_streamed():
    with client.messages.stream(messages=[USER], tools=[LOOK], tool_choice=CHOICE, **SAID) as events:
        pieces = [event for event in events if event.type == "input_json"]
        message = events.get_final_message()
    require(pieces, "no pieces of input")
    with client.messages.stream(**answered(message)) as events:
        require("".join(events.text_stream), "no answer after the result")


def structured():
    asked = [{"role": "user", "content": "Describe the city of Bonn."}]
    reply = client.messages.parse(messages=asked, output_format=Place, **SAID)
    require(isinstance(reply.parsed_output, Place), "no object")


def counts():
    tools = {"tools": [LOOK], "tool_choice": {"type": "auto"}}
    for more in ({}, {"system": "Be polite.", **tools}):
        counted = client.messages.count_tokens(model=MODEL, messages=[USER], **more).input_tokens
        usage = client.messages.create(messages=[USER], **more, **SAID).usage
        told = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        require(counted == told, f"{counted} tokens are counted, {told} read")


def raises(kind, stated, **more):
    try:
        client.with_options(**more).messages.create(**{**SAID, "messages": HELLO, **stated})
    except kind as error:
        require(error.request_id and error.body["error"]["message"] and error.type, "no request id, message or type")
        return error
    raise AssertionError(f"{kind.__name__} is not raised")


def errors():
    raises(anthropic.NotFoundError, {"model": "other"})
    raises(anthropic.BadRequestError, {"max_tokens": 0})
    raises(anthropic.AuthenticationError, {}, api_key="wrong")
    long = raises(anthropic.BadRequestError, {"messages": [{"role": "user", "content": "word " * 100_000}]})
    require("prompt is too long" in long.body["error"]["message"], "not called too long")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured,
     "counts": counts, "errors": errors})  # fmt: skip
