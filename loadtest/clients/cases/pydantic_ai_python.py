"""pydantic-ai."""

import asyncio

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, URL, require, run

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
SAID = {"max_tokens": MAX_TOKENS, "temperature": 0}


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


class Report(BaseModel):
    """Weather of a city."""

    city: str = Field(max_length=40)


def text():
    require(Agent(model, model_settings=SAID).run_sync("Say hello.").output, "the answer is empty")


def stream():
    async def main():
        async with Agent(model, model_settings=SAID).run_stream("Say hello.") as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    require(asyncio.run(main()), "the answer is empty")


def tools():
    """A function that the model may call, and an answer that it must give by a call."""
    called = []
    agent = Agent(model, model_settings=SAID)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Current weather of a city."""
        called.append(city)
        return RESULT

    require(agent.run_sync(QUESTION).output, "no answer")
    require(isinstance(Agent(model, output_type=Report, model_settings=SAID).run_sync(QUESTION).output, Report), "no call")


def tools_streamed():
    async def main():
        async with Agent(model, output_type=Report, model_settings=SAID).run_stream(QUESTION) as result:
            return await result.get_output()

    require(isinstance(asyncio.run(main()), Report), "no call")


def structured():
    from pydantic_ai import NativeOutput

    agent = Agent(model, output_type=NativeOutput(City), model_settings=SAID)
    require(isinstance(agent.run_sync("Describe the city of Bonn.").output, City), "no object")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured})
