"""What each weight mode costs in quality and gains in speed, on real text.

    kvloom eval weights [MODEL] [--markdown FILE]

The reference is the same model in fp32. Perplexity, KL and top-1 agreement come from teacher-forced text; step times and
weight bytes from the same engines in the same run.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.requests.request import Request
from kvloom.engine.scheduling import Chunk, StepPlan
from kvloom.loadtest.bench.contexts import random_tokens
from kvloom.loadtest.bench.engine import add, median_seconds, weight_bytes
from kvloom.loadtest.quality.text import reference_text, windows
from kvloom.loadtest.study.flags import add_model, add_outputs, parser
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, Row, console


def log_probabilities(llm: LLM, tokens: Sequence[int], chunk: int = 256) -> Iterator[Tensor]:
    """The distribution after every token but the last, in chunks of [rows, vocab] fp32, in order.

    Runs beside the queue, on blocks of its own that it gives back.
    """
    core = llm.core
    request = Request(id="forced", prompt=tokens, sampling=SamplingParams(), tokens=list(tokens))
    table = core.cache.open(core.domain("", ""), publishes=False, looks_up=False)
    try:
        if not core.cache.reserve(table, len(tokens)):
            raise ValueError(f"the KV cache of {core.cache.capacity_tokens} tokens cannot hold a text of {len(tokens)}")
        for start in range(0, len(tokens) - 1, chunk):
            count = min(chunk, len(tokens) - 1 - start)
            result = core.runner.run(StepPlan([Chunk(request, table, start, count)], []))
            yield torch.log_softmax(core.runner.logits(result, list(range(count))), dim=-1)
    finally:
        core.cache.close(table)


def agreement(llm: LLM, texts: Sequence[Sequence[int]], references: Sequence[Tensor]) -> Row:
    """Compare with reference distributions, one [len(text) - 1, vocab] tensor of log-probabilities per text.

    KL(reference || this) in nats per token; top1: share of positions with the same likeliest token.
    """
    losses, divergences, same = [], [], []
    for text, reference in zip(texts, references):
        start = 0
        for found in log_probabilities(llm, text):
            wanted = reference[start : start + len(found)].float()
            targets = torch.tensor(text[start + 1 : start + 1 + len(found)])
            losses.append(-found.gather(1, targets[:, None])[:, 0])
            divergences.append((wanted.exp() * (wanted - found)).sum(-1))
            same.append(wanted.argmax(-1) == found.argmax(-1))
            start += len(found)
    loss, divergence = torch.cat(losses), torch.cat(divergences)
    return {
        "n": len(loss),
        "ppl": float(loss.mean().exp()),
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(divergence.quantile(0.99)),
        "top1": float(torch.cat(same).float().mean()),
    }


MODES = ("bf16", "int8", "int4", "auto")
COLUMNS = (
    Column("weights", "weights"),
    Column("MB read per step", "bytes", ".0f", 1e-6),
    Column("perplexity", "ppl", ".3f"),
    Column("against fp32", "over_fp32", "+.2%"),
    Column("KL mean", "kl_mean", ".5f"),
    Column("KL p99", "kl_p99", ".4f"),
    Column("top-1 agreement", "top1", ".1%"),
    Column("decode ms, batch 1", "ms_1", ".1f"),
    Column("batch 8", "ms_8", ".1f"),
)


def decode_ms(llm: LLM, batch: int, steps: int = 24) -> float:
    """Median time of a decode step with short contexts."""
    for i in range(batch):
        add(llm, random_tokens(64, llm.model.vocab_size, i), f"w{i}", 2 * steps)
    llm.core.step()
    seconds = median_seconds(llm.core.step, steps)
    for i in range(batch):
        llm.core.abort(f"w{i}")
    return seconds * 1e3


def row(mode: str, llm: LLM, found: Row, perplexity: float) -> Row:
    """One row of the table; `found`: the agreement, `perplexity`: the reference's."""
    speed = {"bytes": weight_bytes(llm), "ms_1": decode_ms(llm, 1), "ms_8": decode_ms(llm, 8)}
    return {"weights": mode, **found, "over_fp32": found["ppl"] / perplexity - 1, **speed}


def measure(model: str, length: int, count: int) -> tuple[list[Row], str]:
    """Every mode: the rows of the table, and its note."""
    reference = LLM(model, dtype="fp32", weights="bf16", device="cpu", kv_memory="512MiB")
    texts = windows(reference.tokenizer.encode(reference_text()), length, count)
    wanted = [torch.cat(list(log_probabilities(reference, text))).half() for text in texts]
    base = agreement(reference, texts, wanted)
    rows = [row("fp32", reference, base, base["ppl"])]
    del reference
    for mode in MODES:
        gc.collect()
        llm = LLM(model, weights=mode, device="cpu", kv_memory="512MiB")
        rows.append(row(mode, llm, agreement(llm, texts, wanted), base["ppl"]))
        console.print(f"measured: {mode}")
        del llm
    tokens = f"{base['n']} tokens of the Python reference in {count} windows of {length}"
    return rows, f"{Path(model).name}, {tokens}. Measured {describe()}."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    made = parser("eval weights", __doc__, allow_abbrev=True)
    add_model(made)
    made.add_argument("--length", type=int, default=1024)
    made.add_argument("--windows", type=int, default=6)
    add_outputs(made, rows="", table="also write the table into this file")
    args = made.parse_args(argv)
    rows, note = measure(args.model, args.length, args.windows)
    return Results(COLUMNS, (), "", None, args.markdown, args.publish, note, rows).conclude()
