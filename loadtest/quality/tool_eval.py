"""Tool calls of any OpenAI server: 20 questions for two tools and 5 that need none, streamed and not.

    kvloom eval tools --server kvloom=http://127.0.0.1:8000 [--server other=http://127.0.0.1:8001] --model NAME

A call is right if it is the only one, of the right function, with arguments that are JSON and say what the question says. All
is asked greedily with tool_choice auto: what differs between servers of the same weights is how they read what the model wrote.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.study.flags import BenchError, add, add_outputs, add_resume, parser
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.study.runner import Steps, finish

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "convert_currency",
            "description": "Convert an amount of money from one currency to another.",
            "parameters": {
                "type": "object",
                "properties": {
                    "amount": {"type": "number", "description": "How much"},
                    "source": {"type": "string", "description": "Three-letter code of the currency it is in"},
                    "target": {"type": "string", "description": "Three-letter code of the currency wanted"},
                },
                "required": ["amount", "source", "target"],
            },
        },
    },
]


class Question(NamedTuple):
    """A question, and the call that answers it; no name for none."""

    text: str
    name: str | None
    arguments: Mapping[str, Any]


def _weather(text: str, city: str) -> Question:
    return Question(text, "get_weather", {"city": city})


def _money(text: str, amount: float, source: str, target: str) -> Question:
    return Question(text, "convert_currency", {"amount": amount, "source": source, "target": target})


QUESTIONS = (
    _weather("What is the weather in Paris?", "Paris"),
    _weather("Is it raining in Oslo right now?", "Oslo"),
    _weather("How warm is it in Cairo today?", "Cairo"),
    _weather("Do I need an umbrella in London?", "London"),
    _weather("Tell me the current weather in Tokyo.", "Tokyo"),
    _weather("What's the temperature in Toronto in celsius?", "Toronto"),
    _weather("Is it windy in Chicago?", "Chicago"),
    _weather("Check the weather for Madrid, please.", "Madrid"),
    _weather("Will I freeze in Moscow if I go out now?", "Moscow"),
    _weather("I am flying to Nairobi, what is the weather there?", "Nairobi"),
    _money("How much is 100 USD in EUR?", 100, "USD", "EUR"),
    _money("Convert 250 EUR to JPY.", 250, "EUR", "JPY"),
    _money("What are 20 GBP in USD?", 20, "GBP", "USD"),
    _money("I have 5000 JPY. How many CHF is that?", 5000, "JPY", "CHF"),
    _money("Please change 75.5 CAD into AUD.", 75.5, "CAD", "AUD"),
    _money("How many SEK do I get for 40 NOK?", 40, "NOK", "SEK"),
    _money("Convert 1200 INR to GBP.", 1200, "INR", "GBP"),
    _money("What is 10 CHF worth in EUR?", 10, "CHF", "EUR"),
    _money("A book costs 15 USD. What is that in MXN?", 15, "USD", "MXN"),
    _money("Exchange 300 AUD to USD.", 300, "AUD", "USD"),
    Question("Hello, how are you?", None, {}),
    Question("Write a haiku about the sea.", None, {}),
    Question("Who wrote Hamlet?", None, {}),
    Question("Explain in one sentence what a list is in Python.", None, {}),
    Question("Thank you, that was all.", None, {}),
)
NEEDED = sum(question.name is not None for question in QUESTIONS)
COLUMNS = (
    Column("server", "server"),
    Column("right calls", "right"),
    Column("right, streamed", "right_streamed"),
    Column("questions for a tool", "needed"),
    Column("calls where none is needed", "needless"),
    Column("questions for none", "unneeded"),
    Column("same calls streamed and not", "same"),
)


class Call(NamedTuple):
    """A call as a client sees it."""

    name: str
    arguments: str


def ask(url: str, body: Mapping[str, Any], timeout: float) -> Iterator[dict[str, Any]]:
    """The JSON of an answer: one object, or one per event of a stream. Raises BenchError."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            if not body.get("stream"):
                yield json.load(reply)
                return
            for line in reply:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])
    except urllib.error.HTTPError as error:
        raise BenchError(
            f"{url} answers {error.code}: {' '.join(error.read().decode(errors='replace').split())[:300]}"
        ) from None
    except (OSError, ValueError) as error:
        raise BenchError(f"{url} does not answer: {error}") from None


def whole(url: str, body: Mapping[str, Any], timeout: float) -> list[Call]:
    """Calls of an answer that is not streamed."""
    (reply,) = ask(url, body, timeout)
    calls = reply["choices"][0]["message"].get("tool_calls") or []
    return [Call(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def streamed(url: str, body: Mapping[str, Any], timeout: float) -> list[Call]:
    """Calls of a stream, put together from their pieces."""
    found: dict[int, list[str]] = {}
    for event in ask(url, {**body, "stream": True}, timeout):
        for choice in event["choices"]:
            for piece in choice["delta"].get("tool_calls") or ():
                call, function = found.setdefault(piece["index"], ["", ""]), piece.get("function") or {}
                call[0] += function.get("name") or ""
                call[1] += function.get("arguments") or ""
    return [Call(*call) for _, call in sorted(found.items())]


def is_right(question: Question, calls: Sequence[Call]) -> bool:
    """Whether these are the one call that answers the question."""
    if len(calls) != 1 or calls[0].name != question.name:
        return False
    try:
        given = json.loads(calls[0].arguments)
    except ValueError:
        return False
    return isinstance(given, dict) and all(_same(given.get(key), value) for key, value in question.arguments.items())


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return isinstance(given, str) and given.strip().casefold() == wanted.casefold()
    return isinstance(given, int | float) and not isinstance(given, bool) and given == wanted


def measure(server: str, url: str, args: argparse.Namespace, steps: Steps) -> Row:
    """Ask one server everything, twice."""
    row: Row = {"server": server, "model": args.model, "needed": NEEDED, "unneeded": len(QUESTIONS) - NEEDED,
                "right": 0, "right_streamed": 0, "needless": 0, "same": 0, "machine": describe()}  # fmt: skip
    steps.name(server)
    for question in QUESTIONS:
        body = {"model": args.model, "messages": [{"role": "user", "content": question.text}], "tools": TOOLS,
                "temperature": 0, "max_tokens": args.max_tokens}  # fmt: skip
        once, again = whole(url, body, args.timeout), streamed(url, body, args.timeout)
        row["right"] += is_right(question, once)
        row["right_streamed"] += is_right(question, again)
        row["needless"] += question.name is None and bool(once)
        row["same"] += once == again
        steps.done()
    return row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("eval tools", __doc__)
    made.add_argument("--server", action="append", required=True, metavar="NAME=URL", help="repeat it for several")
    made.add_argument("--model", required=True, help="its name in the servers' API")
    made.add_argument("--about", default="", help="what the model is, for the note under the table")
    add(made, ("max-tokens", 128, "tokens of an answer"), ("timeout", 120, "seconds for an answer"))
    add_outputs(made)
    add_resume(made)
    args = made.parse_args(argv)
    if not all("=http" in server for server in args.server):
        raise ConfigError(f"--server is {args.server}; allowed: NAME=URL, such as kvloom=http://127.0.0.1:8000")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    note = f"{args.about + '. ' if args.about else ''}Greedy, tool_choice auto, {len(QUESTIONS)} questions. {describe()}."
    results = Results(COLUMNS, ("server", "model"), "Tool calls", args.json, args.markdown, args.publish, note)
    results = results.resumed(args.resume)

    def run() -> None:
        servers = [server.partition("=")[::2] for server in args.server]
        with Steps(len(servers) * len(QUESTIONS)) as steps:
            for name, url in servers:
                if results.find({"server": name, "model": args.model}) is None:
                    results.add(measure(name, url.rstrip("/"), args, steps))

    return finish(results, run)
