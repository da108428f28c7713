"""llama-index."""

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, require, run

model = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, is_function_calling_model=True,
                   max_tokens=MAX_TOKENS, temperature=0, max_retries=0, context_window=4096)  # fmt: skip
HELLO = [ChatMessage(role="user", content="Say hello.")]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


def get_weather(city: str) -> str:
    """Current weather of a city."""
    return RESULT


WEATHER = FunctionTool.from_defaults(get_weather)


def text():
    require(model.chat(HELLO).message.content, "the answer is empty")


def stream():
    require("".join(chunk.delta or "" for chunk in model.stream_chat(HELLO)), "the answer is empty")


def tools():
    reply = model.chat_with_tools([WEATHER], user_msg=QUESTION, tool_choice=TOOL_CHOICE)
    require(model.get_tool_calls_from_response(reply)[0].tool_kwargs["city"], "no call")


def tools_streamed():
    *_, last = model.stream_chat_with_tools([WEATHER], user_msg=QUESTION, tool_choice=TOOL_CHOICE)
    require(model.get_tool_calls_from_response(last)[0].tool_kwargs["city"], "no call")


def structured():
    reply = model.as_structured_llm(City).chat([ChatMessage(role="user", content="Describe the city of Bonn.")])
    require(isinstance(reply.raw, City), "no object")


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured})
