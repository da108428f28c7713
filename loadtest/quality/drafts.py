"""Sparse drafting with dense verification: is the output that of dense decoding, and where does it pay?

    kvloom eval drafts [MODEL] [--dtype fp32] [--prompts 200] [--cases 1x2048,8x4096] [--json FILE] [--markdown FILE]

Identity: greedy continuations of real text with and without drafting; where they differ, the two tokens' log-probabilities
under the dense model tell whether it was a near tie. Speed: milliseconds per token of the same requests, dense and drafted in
turn, so that a busy machine hits both; acceptance from the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.llm import Completion
from kvloom.engine.request import KVOptions
from kvloom.engine.selection import METHODS
from kvloom.loadtest.engine_bench import markdown
from kvloom.loadtest.machine import describe
from kvloom.loadtest.quality.text import reference_text, windows

console = Console(highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Greedy continuations with drafting against those without."""

    method: str
    budget: int
    prompts: int
    identical: int
    largest_gap: float
    """Over first differences: log-probability of dense's token minus that of the drafted run's, under dense; 0 without any."""
    accepted: float
    """Share of drafts that verification kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One batch and context: medians over rounds."""

    method: str
    budget: int
    batch: int
    context: int
    draft_tokens: int
    accepted: float
    dense_ms: float
    """Milliseconds per generated token of one request."""
    drafted_ms: float
    speed_up: float


def greedy(tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)


def acceptance(results: Sequence[Completion]) -> float:
    """Accepted over drafted tokens; NaN if nothing was drafted."""
    used = [result.usage for result in results if result.usage is not None]
    drafted = sum(usage.drafted_tokens for usage in used)
    return sum(usage.accepted_tokens for usage in used) / drafted if drafted else float("nan")


def gap(dense: Completion, drafted: Completion) -> float | None:
    """How much likelier dense's token was than the drafted run's where they first differ; None if they do not."""
    for entry, other in zip(dense.logprobs, drafted.tokens):
        if entry.token != other:
            found = dict(entry.top).get(other)
            return float("inf") if found is None else entry.logprob - found
    return None


def identity(llm: LLM, prompts: Sequence[list[int]], tokens: int, kv: KVOptions) -> Identity:
    """Compare all prompts, in batches of 16."""
    gaps: list[float | None] = []
    drafted: list[Completion] = []
    for i in range(0, len(prompts), 16):
        batch = prompts[i : i + 16]
        plain = llm.generate(batch, greedy(tokens, logprobs=20))
        found = llm.generate(batch, greedy(tokens), kv=kv)
        gaps.extend(gap(a, b) for a, b in zip(plain, found))
        drafted.extend(found)
    different = [value for value in gaps if value is not None]
    return Identity(method=kv.selection or "", budget=kv.budget or 0, prompts=len(prompts), identical=gaps.count(None),
                    largest_gap=max(different, default=0.0), accepted=acceptance(drafted))  # fmt: skip


def per_token_ms(llm: LLM, prompts: Sequence[list[int]], tokens: int, kv: KVOptions) -> tuple[float, float]:
    """Milliseconds per token of decoding all prompts together, and the acceptance. Prompts come from the prefix cache."""
    began = time.perf_counter()
    llm.generate(prompts, greedy(1), kv=kv)
    first = time.perf_counter() - began
    began = time.perf_counter()
    results = llm.generate(prompts, greedy(tokens), kv=kv)
    return (time.perf_counter() - began - first) / (tokens - 1) * 1e3, acceptance(results)


def speed(llm: LLM, prompts: Sequence[list[int]], tokens: int, kv: KVOptions, rounds: int) -> Speed:
    llm.generate(prompts, greedy(1))  # into the prefix cache
    dense, drafted, accepted = [], [], 0.0
    for _ in range(rounds):
        dense.append(per_token_ms(llm, prompts, tokens, KVOptions())[0])
        ms, accepted = per_token_ms(llm, prompts, tokens, kv)
        drafted.append(ms)
    a, b = statistics.median(dense), statistics.median(drafted)
    return Speed(method=kv.selection or "", budget=kv.budget or 0, batch=len(prompts), context=len(prompts[0]),
                 draft_tokens=kv.draft_tokens or 0, accepted=accepted, dense_ms=a, drafted_ms=b, speed_up=a / b)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    args = parse(argv)
    llm = LLM(args.model, dtype=args.dtype, weights=args.weights, kv_memory=args.kv_memory)
    text = llm.tokenizer.encode(reference_text())
    identities, speeds = [], []
    for method in args.methods.split(","):
        if args.prompts:
            kv = KVOptions(selection=method, budget=args.identity_budget, draft=True, draft_tokens=4)
            prompts = windows(text, args.prompt_tokens, args.prompts)
            identities.append(identity(llm, prompts, args.tokens, kv))
            console.print(identities[-1])
        for case in filter(None, args.cases.split(",")):
            batch, context = map(int, case.split("x"))
            for count in map(int, args.draft_tokens.split(",")):
                kv = KVOptions(selection=method, budget=args.budget, draft=True, draft_tokens=count)
                speeds.append(speed(llm, windows(text, context, batch), args.tokens, kv, args.rounds))
                console.print(speeds[-1])
            llm.core.cache.evict()
    head = f"{llm.model.name}, {llm.model.dtype}, weights {llm.model.weights}, {args.tokens} tokens. Measured {describe()}."
    parts = [head, *(markdown(rows) for rows in (identities, speeds) if rows)]
    if args.markdown:
        args.markdown.write_text("\n\n".join(parts) + "\n")
    if args.json:
        rows = {"identity": [asdict(row) for row in identities], "speed": [asdict(row) for row in speeds]}
        args.json.write_text(json.dumps({"about": head, **rows}, indent=1))
    console.print("\n\n".join(parts), soft_wrap=True)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvloom eval drafts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    for name, default in (("dtype", "bf16"), ("weights", "auto"), ("kv-memory", "4GiB")):
        parser.add_argument(f"--{name}", default=default, help="as in kvloom serve (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--budget", type=int, default=512, help="of the speed cases (default: %(default)s)")
    parser.add_argument("--draft-tokens", default="2,4,6", help="of the speed cases (default: %(default)s)")
    parser.add_argument("--cases", default="1x2048,1x7500,8x2048,8x7500", help="batch x context (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="dense and drafted in turn (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="to compare texts on; 0 for none (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=160, help="length of each (default: %(default)s)")
    parser.add_argument("--identity-budget", type=int, default=64, help="budget of that comparison (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="generated per prompt (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    for method in args.methods.split(","):
        if method not in METHODS:
            parser.error(f"method {method!r} is not known; allowed: {', '.join(METHODS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
