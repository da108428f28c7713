"""langchain-openai: what is asked through each of its APIs."""

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, TOOL_CHOICE, URL, require


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


@tool
def get_weather(city: str) -> str:
    """Current weather of a city."""
    return RESULT


def cases(**options):
    """What is asked, of a model with these options."""
    said = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_retries": 0, "max_tokens": MAX_TOKENS, "temperature": 0}
    model = ChatOpenAI(**said, **options)

    def text():
        require(model.invoke("Say hello.").text, "the answer is empty")

    def stream():
        require("".join(chunk.text for chunk in model.stream("Say hello.")), "the answer is empty")

    def tools():
        messages = [HumanMessage(QUESTION)]
        answer = model.bind_tools([get_weather], tool_choice=TOOL_CHOICE).invoke(messages)
        require(answer.tool_calls and answer.tool_calls[0]["args"]["city"], "no call")
        messages += [answer, *(get_weather.invoke(call) for call in answer.tool_calls)]
        require(model.invoke(messages).text, "no answer after the result")

    def tools_streamed():
        whole = None
        for chunk in model.bind_tools([get_weather], tool_choice=TOOL_CHOICE).stream(QUESTION):
            whole = chunk if whole is None else whole + chunk
        require(whole is not None and whole.tool_calls[0]["args"]["city"], "no call")

    def structured():
        for method in ("json_schema", "function_calling", "json_mode"):
            asked = model.with_structured_output(City, method=method)
            if method == "json_mode":
                asked = model.with_structured_output(method=method)
            found = asked.invoke('Repeat this as JSON: {"name": "Bonn", "inhabitants": 300000}')
            require(isinstance(found, City | dict), f"{method}: no object")

    return {"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed, "structured": structured}
