"""smolagents: a ToolCallingAgent, whose every step is a call."""

from report import KEY, MAX_TOKENS, MODEL, QUESTION, RESULT, URL, require, run
from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY, max_tokens=MAX_TOKENS, temperature=0)
HELLO = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]


@tool
def get_weather(city: str) -> str:
    """Current weather of a city.

    Args:
        city: Its name.
    """
    return RESULT


def text():
    require(model.generate(HELLO).content, "the answer is empty")


def stream():
    require("".join(delta.content or "" for delta in model.generate_stream(HELLO)), "the answer is empty")


def calls(agent):
    agent.run(QUESTION, max_steps=2)
    steps = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    require(steps, "no step called a tool")


def tools():
    calls(ToolCallingAgent(tools=[get_weather], model=model, verbosity_level=LogLevel.OFF))


def tools_streamed():
    calls(ToolCallingAgent(tools=[get_weather], model=model, verbosity_level=LogLevel.OFF, stream_outputs=True))


run({"text": text, "stream": stream, "tools": tools, "tools streamed": tools_streamed})
