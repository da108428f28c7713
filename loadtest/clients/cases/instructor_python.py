"""instructor: every answer is an object, by calls or by a schema."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field
from report import KEY, MAX_TOKENS, MODEL, URL, require, run

SAID = {"model": MODEL, "max_tokens": MAX_TOKENS, "temperature": 0, "max_retries": 1,
        "messages": [{"role": "user", "content": 'Repeat this: {"name": "Bonn", "inhabitants": 300000}'}]}  # fmt: skip


class City(BaseModel):
    name: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=100_000_000)


def asked(mode):
    client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)
    return client.chat.completions


def tools():
    require(isinstance(asked(instructor.Mode.TOOLS).create(response_model=City, **SAID), City), "no object")


def tools_streamed():
    *_, last = asked(instructor.Mode.TOOLS).create_partial(response_model=City, **SAID)
    require(last.name is not None, "no object")


class Anything(BaseModel):
    """The mode JSON promises an object, not which."""

    model_config = {"extra": "allow"}


def structured():
    for mode, model in ((instructor.Mode.JSON, Anything), (instructor.Mode.JSON_SCHEMA, City)):
        require(isinstance(asked(mode).create(response_model=model, **SAID), model), f"{mode}: no object")


run({"tools": tools, "tools streamed": tools_streamed, "structured": structured})
