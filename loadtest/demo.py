"""`make demo`: start a server on a free port, talk to it as users do, print answers and figures, shut down cleanly.

    python -m kvloom.loadtest.demo [--model NAME]

Five things are shown, each through openai-python: a plain answer, a call of a tool, an answer of a given schema, a batch of
concurrent streams that share a system prompt (and so its KV), and the refusal of a bad request. Exit code 0 only if every
answer was right in form.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.shared_params import ResponseFormatJSONSchema
from rich.console import Console
from rich.table import Table

from kvloom.loadtest.client.servers import answers, free_port

SYSTEM = (
    "You are the guide of a small botanical garden. Answer visitors in one or two friendly sentences. The garden has a palm "
    "house, a rose walk, a pond with water lilies, a herb spiral, a meadow with beehives, and a cafe that serves elderflower "
    "lemonade. It opens at nine in the morning and closes at six in the evening, and children enter free of charge. Dogs are "
    "welcome on a lead, except in the palm house. Guided tours start at the main gate at eleven and at three."
)
QUESTIONS = (
    "When does the garden open?",
    "May I bring my dog?",
    "What can I drink at the cafe?",
    "Where do the guided tours start?",
    "What grows in the pond?",
    "Do children pay?",
    "Are there bees?",
    "What should I see first?",
)
TICKETS: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "book_tickets",
        "description": "Book tickets for the garden.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"adults": {"type": "integer"}, "day": {"type": "string", "enum": ["Saturday", "Sunday"]}},
            "required": ["adults", "day"],
            "additionalProperties": False,
        },
    },
}
PLANT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "flowers": {"type": "boolean"}},
    "required": ["name", "flowers"],
    "additionalProperties": False,
}
START_SECONDS = 120.0


class Malformed(Exception):
    """An answer was not what the API promises."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer as a client saw it. Times in seconds."""

    question: str
    text: str
    ttft: float
    tpot: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int


def require(ok: bool, what: str) -> None:
    """Raise Malformed unless `ok`."""
    if not ok:
        raise Malformed(what)


def messages(question: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def ask(client: OpenAI, model: str) -> str:
    """A plain request."""
    reply = client.chat.completions.create(model=model, messages=messages("Hello! Who are you?"), max_tokens=48, temperature=0)
    choice, usage = reply.choices[0], reply.usage
    require(choice.finish_reason in ("stop", "length"), f"finish_reason is {choice.finish_reason!r}")
    require(bool(choice.message.content), "the answer is empty")
    require(usage is not None and usage.completion_tokens >= 1, "usage is missing")
    return choice.message.content or ""


def call(client: OpenAI, model: str) -> str:
    """A tool that must be called: its arguments are valid whatever the model thinks of it."""
    question = messages("Two adults would like to come on Sunday. Please book.")
    reply = client.chat.completions.create(model=model, messages=question, tools=[TICKETS], tool_choice="required",
                                           parallel_tool_calls=False, max_tokens=64, temperature=0)  # fmt: skip
    choice = reply.choices[0]
    require(choice.finish_reason == "tool_calls", f"finish_reason is {choice.finish_reason!r}")
    (made,) = choice.message.tool_calls or []
    if made.type != "function" or made.function.name != "book_tickets":
        raise Malformed("another function was called")
    given = json.loads(made.function.arguments)
    require(isinstance(given["adults"], int) and given["day"] in ("Saturday", "Sunday"), f"the arguments are {given}")
    return f"{made.function.name}({made.function.arguments})"


def describe(client: OpenAI, model: str) -> str:
    """An answer that is valid against a schema."""
    question = messages("Name one plant of the garden, and say whether it flowers.")
    form: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "plant", "strict": True, "schema": PLANT},
    }
    reply = client.chat.completions.create(model=model, messages=question, response_format=form, max_tokens=64, temperature=0)
    text = reply.choices[0].message.content or ""
    given = json.loads(text)
    require(set(given) == {"name", "flowers"} and isinstance(given["flowers"], bool), f"the answer is {text}")
    return text


async def stream(client: AsyncOpenAI, model: str, question: str) -> Answer:
    """A streamed request, timed."""
    began = time.perf_counter()
    first = last = 0.0
    text, finish, usage = "", None, None
    replies = await client.chat.completions.create(
        model=model,
        messages=messages(question),
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in replies:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                last = time.perf_counter()
                first = first or last
                text += choice.delta.content
    require(finish in ("stop", "length"), f"finish_reason is {finish!r} for {question!r}")
    require(bool(text), f"no text for {question!r}")
    if usage is None or usage.prompt_tokens_details is None:
        raise Malformed("a stream ended without usage")
    tokens = usage.completion_tokens
    return Answer(question, text, first - began, (last - first) / max(1, tokens - 1), tokens, usage.prompt_tokens,
                  usage.prompt_tokens_details.cached_tokens or 0)  # fmt: skip


def refuse(client: OpenAI, model: str) -> str:
    """A bad request, which must be refused without harm."""
    try:
        client.chat.completions.create(model=model, messages=messages("?"), max_tokens=-1)
    except BadRequestError as error:
        require(error.param == "max_tokens", f"the refusal blames {error.param!r}")
        return error.message
    raise Malformed("max_tokens=-1 was accepted")


async def crowd(base_url: str, model: str) -> tuple[list[Answer], float]:
    """All questions at once; the answers and the wall time."""
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        began = time.perf_counter()
        given = await asyncio.gather(*(stream(client, model, question) for question in QUESTIONS))
        return list(given), time.perf_counter() - began


def report(console: Console, given: list[Answer], wall: float) -> None:
    talk = Table("question", "answer", title="Concurrent streams with a shared system prompt", show_lines=True)
    for answer in given:
        talk.add_row(answer.question, " ".join(answer.text.split()))
    console.print(talk)
    figures = Table("", "median", "worst", title="What the client measured")
    for name, values in (("TTFT", [a.ttft for a in given]), ("TPOT", [a.tpot for a in given])):
        figures.add_row(name, f"{statistics.median(values) * 1e3:.1f} ms", f"{max(values) * 1e3:.1f} ms")
    console.print(figures)
    tokens, prompt, cached = (sum(getattr(a, name) for a in given) for name in ("tokens", "prompt_tokens", "cached_tokens"))
    console.print(f"throughput        {tokens / wall:.1f} output tokens/s ({tokens} tokens in {wall:.2f} s)")
    console.print(f"prefix-hit tokens {cached} of {prompt} prompt tokens ({cached / prompt:.0%})")


def converse(console: Console, base_url: str, model: str) -> None:
    """The whole conversation. Raises Malformed."""
    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
    require(model in [entry.id for entry in client.models.list()], "the model is not listed")
    console.print(f"[bold]plain answer[/]      {ask(client, model)}")
    console.print(f"[bold]called tool[/]       {call(client, model)}", highlight=False)
    console.print(f"[bold]answer of a schema[/] {describe(client, model)}", highlight=False)
    console.print(f"[bold]refused request[/]   {refuse(client, model)}")
    given, wall = asyncio.run(crowd(base_url, model))
    report(console, given, wall)
    reused = sum(answer.cached_tokens > 0 for answer in given)
    require(2 * reused > len(given), "the shared system prompt was not reused")  # each of several replicas computes it once
    with urllib.request.urlopen(f"{base_url}/kv", timeout=10) as reply:
        kv = json.load(reply)
    used = [group["in_use"] for group in kv["blocks"].values()]
    require(not any(used), f"blocks are still in use afterwards: {used}")
    console.print(f"KV cache          {kv['capacity_tokens']} tokens, hit rate {kv['hit_rate']:.0%}, no block in use")


def wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> float:
    """Seconds until /health says 200. Raises Malformed if the server ends or takes too long."""
    began = time.perf_counter()
    while not answers(url):
        require(server.poll() is None, f"the server ended with exit code {server.returncode}")
        require(time.perf_counter() - began < START_SECONDS, f"the server was not healthy after {START_SECONDS:.0f} s")
        time.sleep(0.05)
    return time.perf_counter() - began


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvloom.loadtest.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="what to serve (default: %(default)s)")
    args = parser.parse_args()
    console, port = Console(), free_port()
    base_url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "kvloom.server.cli", "serve", args.model, "--port", str(port)])
    try:
        seconds = wait_until_healthy(base_url, server)
        console.print(f"server healthy after {seconds:.1f} s")
        converse(console, f"{base_url}/v1", args.model)
        server.send_signal(signal.SIGINT)
        require(server.wait(timeout=30) == 0, f"the server ended with exit code {server.returncode}")
    except Malformed as error:
        console.print(f"[red]failed:[/] {error}")
        return 1
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    console.print("[green]all answers were right in form; the server shut down cleanly[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
