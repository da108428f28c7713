"""`kvloom bench engine`: the engine without HTTP, held against what this machine can do.

    prefill        tokens per second of one prompt, by length, and GFLOP/s of its linear layers and attention
    decode         milliseconds per step by batch and context; bytes that a step must read (weights once, KV of every
                   request) over its time; the floor is those bytes over the machine's measured read bandwidth
    outside        share of a decode step spent outside the model: scheduling, plans, sampling, text. Steps as they are served;
                   attention_ms and linear_ms are of further steps, whose kernels are called and timed one by one

Ceilings are measured in the same run: reading memory with all threads, and torch's bf16 and fp32 matrix products. Decode steps
find their context in the prefix cache, filled with random numbers instead of computed KV, so that long contexts cost no time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.requests.request import Request
from kvloom.kernels import Kernels
from kvloom.kernels.quantized import KINDS, StoredWeight
from kvloom.loadtest.bench.contexts import random_tokens, remember
from kvloom.loadtest.figures import markdown, publish
from kvloom.loadtest.study.flags import add_engine, add_model, add_outputs, need, parser
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.pictures import picture
from kvloom.loadtest.study.results import Column, Row, cells, console, console_table

DECODES = ((1, 128), (1, 512), (1, 4096), (1, 7500), (2, 512), (4, 512), (8, 512), (16, 1024), (8, 4096), (8, 7500))
PREFILLS = (128, 512, 1024, 4096)
LINEARS = ("qkv", "o", "gate_up", "down")


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `repeats` calls after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine can do with all threads: reading in GB/s (10^9 bytes), products in GFLOP/s."""

    read_gbs: float
    bf16_gflops: float
    fp32_gflops: float


def measure_ceilings(kernels: Kernels) -> Ceilings:
    """Reading counts at the best of several ways to do it: sums, a matrix-vector product, and the back end's own product of
    one row with 100 MB of 8-bit codes, which does little else than read."""
    data = torch.ones(1 << 14, 1 << 12)  # 256 MiB of fp32: beyond a core's own caches
    ones = torch.ones(1 << 12)
    readers: list[tuple[int, Callable[[], Any]]] = [
        (data.nbytes, data.sum),
        (data.nbytes, lambda: data.view(torch.int64).sum()),
        (data.nbytes, lambda: torch.mv(data, ones)),
    ]
    if kernels.quantized is not None:
        blocks = torch.ones(81_920, KINDS["Q8_0"].row_bytes(1152), dtype=torch.uint8)
        packed = kernels.quantized.pack(StoredWeight("Q8_0", blocks, (81_920, 1152)))
        multiply = kernels.quantized.linear(packed, None)
        row, out = torch.ones(1, 1152, dtype=torch.bfloat16), torch.empty(1, 81_920)
        readers.append((packed.data.nbytes, lambda: multiply(row, out)))
    read = max(size / median_seconds(reader, 9) for size, reader in readers) / 1e9

    def product(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 4096, dtype=dtype)
        return 2 * 1024 * 1024 * 4096 / median_seconds(lambda: a @ b, 7) / 1e9

    return Ceilings(read_gbs=read, bf16_gflops=product(torch.bfloat16), fp32_gflops=product(torch.float32))


@dataclass(slots=True)
class Clock:
    """Seconds spent inside kernels and linear layers, by name."""

    spent: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return timed


class TimedKernels:
    """A back end whose calls are timed; everything else is the back end's own."""

    OPERATIONS = ("attend", "rotate_store", "add_rms_norm", "silu_mul", "plan")

    def __init__(self, kernels: Any, clock: Clock) -> None:
        self._kernels = kernels
        for name in self.OPERATIONS:
            setattr(self, name, clock.wrap(name, getattr(kernels, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


@contextlib.contextmanager
def instrumented(llm: LLM) -> Iterator[Clock]:
    """Time every kernel and linear layer of an engine meanwhile, called one by one."""
    runner: Any = llm.core.runner
    decoder, attention, clock = runner.decoder, runner._attention, Clock()
    kernels, layers, head = decoder.kernels, list(decoder.layers), decoder.head
    with decoder.capturing("none"):
        decoder.kernels = attention._kernels = TimedKernels(kernels, clock)
        decoder.layers[:] = [
            dataclasses.replace(layer, **{name: clock.wrap("linear", getattr(layer, name)) for name in LINEARS})
            for layer in layers
        ]
        decoder.head = clock.wrap("head", head)
        try:
            yield clock
        finally:
            decoder.kernels = attention._kernels = kernels
            decoder.layers[:], decoder.head = layers, head


def linears(llm: LLM) -> list[Any]:
    """Every linear layer but the head."""
    decoder: Any = llm.core.runner.decoder
    return [getattr(layer, name) for layer in decoder.layers for name in LINEARS]


def add(llm: LLM, prompt: Sequence[int], name: str, steps: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    llm.core.add(Request(id=name, prompt=prompt, sampling=sampling))


def steps_as_served(llm: LLM, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of decode steps, and the share of each that is spent outside the model."""
    decoder, clock, seconds, shares = llm.core.runner.decoder, Clock(), [], []
    with mock.patch.multiple(decoder, forward=clock.wrap("model", decoder.forward), logits=clock.wrap("model", decoder.logits)):
        for _ in range(steps):
            clock.spent.clear()
            began = time.perf_counter()
            llm.core.step()
            seconds.append(time.perf_counter() - began)
            shares.append(1 - clock.spent["model"] / seconds[-1])
    return seconds, shares


def start_decoding(llm: LLM, batch: int, context: int, steps: int) -> None:
    """Requests whose contexts are found in the cache, past the rest of their prompts and warm-up, with `steps` to go."""
    prompts = [random_tokens(context, llm.model.vocab_size, 1000 * batch + i) for i in range(batch)]
    for prompt in prompts:
        remember(llm.core, prompt)
    for i, prompt in enumerate(prompts):
        add(llm, prompt, f"decode-{i}", steps + 4)
    for _ in range(3):
        llm.core.step()


def stop_decoding(llm: LLM, batch: int) -> None:
    """The end of what `start_decoding` began."""
    for i in range(batch):
        llm.core.abort(f"decode-{i}")
    llm.core.cache.evict()


def decode_steps(llm: LLM, batch: int, context: int, steps: int = 24) -> list[float]:
    """Seconds of decode steps."""
    start_decoding(llm, batch, context, steps)
    seconds, _ = steps_as_served(llm, steps)
    stop_decoding(llm, batch)
    return seconds


def prefill_seconds(llm: LLM, length: int, seed: int = 0) -> float:
    """Seconds of one prompt and its first token, nothing of it in the cache."""
    add(llm, random_tokens(length, llm.model.vocab_size, seed), f"prefill-{seed}", 1)
    began = time.perf_counter()
    while llm.core.busy:
        llm.core.step()
    spent = time.perf_counter() - began
    llm.core.cache.evict()
    return spent


def decode_case(llm: LLM, batch: int, context: int, ceilings: Ceilings, steps: int = 24) -> Row:
    """One row of the table: medians over steps. Times in ms, rates in 10^9 per second.

    read_bytes: weights once, and K and V of every request's context; floor_ms: those over the machine's read bandwidth;
    outside_share: of the step's time, outside the model.
    """
    start_decoding(llm, batch, context, 2 * steps)
    core = llm.core
    seconds, shares = steps_as_served(llm, steps)
    plain = statistics.median(seconds)
    attention, linear = [], []
    with instrumented(llm) as clock:
        for _ in range(steps):
            clock.spent.clear()
            core.step()
            attention.append(clock.spent["attend"])
            linear.append(clock.spent["linear"] + clock.spent["head"])
    stop_decoding(llm, batch)
    per_token = sum(layer.k[0, :, 0].nbytes * 2 for layer in core.cache.storage.layers)
    kv_bytes = batch * context * per_token
    read = weight_bytes(llm) + kv_bytes
    attended = statistics.median(attention)
    return {
        "batch": batch,
        "context": context,
        "step_ms": plain * 1e3,
        "tokens_per_s": batch / plain,
        "read_bytes": read,
        "gbs": read / plain / 1e9,
        "floor_ms": read / ceilings.read_gbs / 1e6,
        "over_floor": plain * ceilings.read_gbs * 1e9 / read,
        "attention_ms": attended * 1e3,
        "attention_gbs": kv_bytes / attended / 1e9,
        "linear_ms": statistics.median(linear) * 1e3,
        "outside_share": statistics.median(shares),
    }


def weight_bytes(llm: LLM) -> int:
    """Bytes of weights that a decode step reads: every linear layer and the head, once."""
    head: Any = llm.core.runner.decoder.head
    return sum(linear.nbytes for linear in (*linears(llm), head))


def prefill_case(llm: LLM, length: int, repeats: int = 3) -> Row:
    """One row of the table, of one prompt length: medians over repeats."""
    config = llm.core.runner.decoder.config
    seconds, attention, linear = [], [], []
    with instrumented(llm) as clock:
        for i in range(repeats + 1):
            clock.spent.clear()
            spent = prefill_seconds(llm, length, i)
            if i:  # the first is warm-up
                seconds.append(spent)
                attention.append(clock.spent["attend"])
                linear.append(clock.spent["linear"])
    weights = sum(one.in_features * one.out_features for one in linears(llm))
    attention_flops = 4 * config.q_heads * config.head_dim * config.layers * length * (length + 1) / 2
    total, attended = statistics.median(seconds), statistics.median(attention)
    return {
        "tokens": length,
        "seconds": total,
        "tokens_per_s": length / total,
        "linear_gflops": 2 * weights * length / statistics.median(linear) / 1e9,
        "attention_gflops": attention_flops / attended / 1e9,
        "attention_share": attended / total,
    }


def digits(value: float) -> str:
    """Three significant digits, or a whole number."""
    if not isinstance(value, float):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def plot(path: Path, decodes: Sequence[Row], prefills: Sequence[Row], ceilings: Ceilings) -> None:
    """Bars of decode step against its floor, and of prefill rates."""
    with picture(path, 1, 2, (12, 4.5)) as (_, axes):
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        left, right = axes[0]
        names = [f"{row['batch']} x {row['context']}" for row in decodes]
        for offset, label, key in ((-0.2, "measured", "step_ms"), (0.2, "memory floor", "floor_ms")):
            heights = [row[key] for row in decodes]
            bars = left.bar([x + offset for x in range(len(names))], heights, 0.38, label=label)
            left.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=7, padding=1)
        left.set(title="Decode step by batch x context (log scale)", ylabel="ms", yscale="log")
        left.set_xticks(range(len(names)), names, rotation=40)
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(NullFormatter())
        left.margins(y=0.1)
        left.legend()
        lengths = [row["tokens"] for row in prefills]
        right.plot(lengths, [row["linear_gflops"] for row in prefills], "o-", label="linear layers")
        right.plot(lengths, [row["attention_gflops"] for row in prefills], "s-", label="attention")
        right.axhline(ceilings.bf16_gflops, color="grey", linestyle="--", label="torch bf16 matrix product")
        right.axhline(ceilings.fp32_gflops, color="grey", linestyle=":", label="torch fp32 matrix product")
        right.set(title="Prefill", xlabel="prompt tokens", ylabel="GFLOP/s (integer operations count as such)", xscale="log")
        right.set_ylim(bottom=0)
        right.set_xticks(lengths, [f"{length}" for length in lengths])
        right.xaxis.set_minor_formatter(NullFormatter())
        right.legend()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    made = parser("bench engine", __doc__, allow_abbrev=True)
    add_model(made)
    add_engine(made, leave_out=("threads",))
    made.add_argument("--decode", default=",".join(f"{b}x{c}" for b, c in DECODES), help="batch x context: %(default)s")
    made.add_argument("--prefill", default=",".join(map(str, PREFILLS)), help="prompt lengths: %(default)s")
    add_outputs(made, rows="", table="also write the tables into this file")
    made.add_argument("--out", type=Path, default=Path("results/engine"), help="folder for engine.json and engine.png")
    args = made.parse_args(argv)
    need("matplotlib")
    engine = {"weights": args.weights, "backend": args.backend, "kv_memory": args.kv_memory}
    llm = LLM(args.model, dtype=args.dtype, device="cpu", **engine)  # as its ceilings are
    ceilings = measure_ceilings(llm.core.runner.decoder.kernels)
    head = (
        f"{llm.model.name}, {llm.model.dtype}, weights {llm.model.weights}, {llm.model.backend} kernels. Ceilings: reading "
        f"{ceilings.read_gbs:.1f} GB/s, products "
        f"{ceilings.bf16_gflops:.0f} (bf16) and {ceilings.fp32_gflops:.0f} (fp32) GFLOP/s. "
        f"Measured {describe()}."
    )
    console.print(head)
    cases = [tuple(map(int, case.split("x"))) for case in args.decode.split(",") if case]
    rows = {
        "prefill": [prefill_case(llm, int(length)) for length in args.prefill.split(",") if length],
        "decode": [decode_case(llm, batch, context, ceilings) for batch, context in cases],
    }
    tables = {title: cells([Column(name, name, digits) for name in part[0]], part) for title, part in rows.items() if part}
    for title, table in tables.items():
        console.print(console_table(*table, title))
    report = {"machine": describe(), "model": asdict(llm.model), "ceilings": asdict(ceilings), **rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "engine.json").write_text(json.dumps(report, indent=1))
    plot(args.out / "engine.png", rows["decode"], rows["prefill"], ceilings)
    if args.markdown:
        about = "`kvloom bench engine` measures:\n\n```\n" + (__doc__ or "").split("\n", 2)[2] + "```"
        parts = ["# The engine alone", about, head, *(markdown(*table) for table in tables.values())]
        args.markdown.write_text("\n\n".join(parts) + "\n")
    for title, table in tables.items() if args.publish else ():
        publish(args.publish.with_stem(f"{args.publish.stem}-{title}"), *table, head if title == "decode" else "")
    console.print(f"written: {args.out / 'engine.json'}, {args.out / 'engine.png'}")
    return 0
