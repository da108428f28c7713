"""openai-python's responses."""

import json

from openai import OpenAI
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, WEATHER, require, run

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
SAID = {"model": MODEL, "max_output_tokens": MAX_TOKENS, "temperature": 0}
TOOL = {"type": "function", "strict": False, **WEATHER["function"]}


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


def text():
    """Create, retrieve, continue, list, delete."""
    first = client.responses.create(input="Say hello.", instructions="You are polite.", **SAID)
    require(first.output_text and client.responses.retrieve(first.id) == first, "another answer is stored")
    second = client.responses.create(input="Say it again.", previous_response_id=first.id, **SAID)
    require(second.output_text and second.usage.input_tokens > first.usage.input_tokens, "the conversation did not go on")
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    require([item.role for item in items] == ["user", "assistant", "user"], "other items")
    client.responses.delete(first.id)


def stream():
    events = list(client.responses.create(input="Say hello.", stream=True, **SAID))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    require(said and said == events[-1].response.output_text, "the stream is not the answer")


def tools():
    """A loop: the call, its result, the answer."""
    reply = client.responses.create(input=QUESTION, tools=[TOOL], tool_choice=TOOL_CHOICE, **SAID)
    calls = [item for item in reply.output if item.type == "function_call"]
    require(calls and all(json.loads(call.arguments)["city"] for call in calls), "no call")
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT} for call in calls]
    continued = client.responses.create(input=results, previous_response_id=reply.id, **SAID)
    sent = [{"role": "user", "content": QUESTION}, *reply.output, *results]
    again = client.responses.create(input=sent, store=False, **SAID)
    require(continued.output_text and continued.output_text == again.output_text, "no answer, or another, after the result")


def tools_streamed():
    with client.responses.stream(input=QUESTION, tools=[TOOL], tool_choice=TOOL_CHOICE, **SAID) as events:
        pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
        final = events.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]
    require(pieces and json.loads(calls[0].arguments)["city"], "no pieces of arguments")
    require([item.to_dict() for item in client.responses.retrieve(final.id).output] == [
        {key: value for key, value in item.to_dict().items() if not key.startswith("parsed")} for item in final.output
    ], "another answer is stored")  # fmt: skip


def structured():
    reply = client.responses.parse(input="Describe the city of Bonn.", text_format=City, **SAID)
    require(isinstance(reply.output_parsed, City), "no object")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured})
