"""What each weight mode costs in quality and gains in speed, on real text.

    kvloom eval weights [MODEL] [--markdown FILE]

The reference is the same model in fp32. Perplexity, KL and top-1 agreement come from teacher-forced text; step times and
weight bytes from the same engines in the same run.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from kvloom.engine import LLM
from kvloom.loadtest.bench.engine import add, median_seconds, random_tokens, weight_bytes
from kvloom.loadtest.figures import add_publish, markdown, publish
from kvloom.loadtest.quality.forced import Agreement, agreement, log_probabilities
from kvloom.loadtest.quality.text import reference_text, windows
from kvloom.loadtest.study.machine import describe

console = Console(highlight=False)
MODES = ("bf16", "int8", "int4", "auto")


def decode_ms(llm: LLM, batch: int, steps: int = 24) -> float:
    """Median time of a decode step with short contexts."""
    for i in range(batch):
        add(llm, random_tokens(64, llm.model.vocab_size, i), f"w{i}", 2 * steps)
    llm.core.step()
    seconds = median_seconds(llm.core.step, steps)
    for i in range(batch):
        llm.core.abort(f"w{i}")
    return seconds * 1e3


COLUMNS = (
    "weights",
    "MB read per step",
    "perplexity",
    "against fp32",
    "KL mean",
    "KL p99",
    "top-1 agreement",
    "decode ms, batch 1",
    "batch 8",
)


def row(mode: str, llm: LLM, found: Agreement, perplexity: float) -> list[str]:
    """One row of the table; `perplexity` is the reference's."""
    return [
        mode,
        f"{weight_bytes(llm) / 1e6:.0f}",
        f"{found.perplexity:.3f}",
        f"{found.perplexity / perplexity - 1:+.2%}",
        f"{found.kl_mean:.5f}",
        f"{found.kl_p99:.4f}",
        f"{found.top1:.1%}",
        f"{decode_ms(llm, 1):.1f}",
        f"{decode_ms(llm, 8):.1f}",
    ]


def measure(model: str, length: int, count: int) -> tuple[list[list[str]], str]:
    """Every mode: the rows of the table, and its note."""
    reference = LLM(model, dtype="fp32", weights="bf16", kv_memory="512MiB")
    texts = windows(reference.tokenizer.encode(reference_text()), length, count)
    wanted = [torch.cat(list(log_probabilities(reference, text))).half() for text in texts]
    base = agreement(reference, texts, wanted)
    rows = [row("fp32", reference, base, base.perplexity)]
    del reference
    for mode in MODES:
        gc.collect()
        llm = LLM(model, weights=mode, kv_memory="512MiB")
        found = agreement(llm, texts, wanted)
        rows.append(row(mode, llm, found, base.perplexity))
        console.print(*rows[-1])
        del llm
    name = Path(model).name
    note = f"{name}, {base.tokens} tokens of the Python reference in {count} windows of {length}. Measured {describe()}."
    return rows, note


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kvloom eval weights", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
    add_publish(parser)
    args = parser.parse_args(argv)
    rows, note = measure(args.model, args.length, args.windows)
    text = f"{markdown(COLUMNS, rows)}\n\n{note}"
    console.print(text, soft_wrap=True)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.publish:
        publish(args.publish, COLUMNS, rows, note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
