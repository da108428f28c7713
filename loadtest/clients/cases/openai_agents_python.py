"""openai-agents, whose default model speaks of responses."""

import asyncio

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, require, run

set_tracing_disabled(True)
CALLED: list[str] = []


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


@function_tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    CALLED.append(city)
    return RESULT


def agent(**options):
    model = OpenAIResponsesModel(MODEL, AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0))
    choice = TOOL_CHOICE if "tools" in options else None
    settings = ModelSettings(max_tokens=MAX_TOKENS, temperature=0, tool_choice=choice)
    return Agent(name="Helper", instructions="You answer briefly.", model=model, model_settings=settings, **options)


def text():
    require(Runner.run_sync(agent(), "Say hello.").final_output, "the answer is empty")


async def streamed(helper, question):
    """(the result, types of the events of the model's)."""
    result = Runner.run_streamed(helper, question)
    seen = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    return result, seen


def stream():
    result, seen = asyncio.run(streamed(agent(), "Say hello."))
    require(result.final_output and "response.output_text.delta" in seen, "the answer is empty")


def tools():
    """Its loop, twice: all items sent again, and by the id of the response before."""
    for options in ({}, {"auto_previous_response_id": True}):
        CALLED.clear()
        result = Runner.run_sync(agent(tools=[get_weather]), QUESTION, **options)
        require(CALLED and result.final_output, "no call, or no answer after it")


def tools_streamed():
    CALLED.clear()
    result, seen = asyncio.run(streamed(agent(tools=[get_weather]), QUESTION))
    require(CALLED and result.final_output and "response.function_call_arguments.delta" in seen, "no call, or no answer")


def structured():
    found = Runner.run_sync(agent(output_type=City), "Describe the city of Bonn.").final_output
    require(isinstance(found, City), "no object")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured})
