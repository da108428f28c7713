"""Quality of any OpenAI server: perplexity of real text, agreement with a second server, and needles.

    kvloom eval server --base-url http://127.0.0.1:8000 --model smollm2 [--reference-url URL] [--kv '{"selection": ...}']

    perplexity   of the same texts for every server: per token of the server's own tokenizer, and in bits per byte
    agreement    both servers over the same tokens: share with the same likeliest one, and KL over what both list. Servers tell
                 only the likeliest few, so all others count as one: a lower bound, close where those weigh little
    needles      planted facts, asked at the end of the prompt

Prompts are scored in one piece, so this sees what changes prompts and stored KV (weights, reuse, retention, sparse prefill).
A method that only changes decode steps shows in the needles, from the answer's second token on; `kvloom eval methods` measures
those on the engine itself.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import json_object
from kvloom.loadtest.quality.scoring import Completions, Scored, all_of, coarse_divergence, likeliest
from kvloom.loadtest.quality.tasks import NEEDLES, Trial, trials
from kvloom.loadtest.study.flags import add, add_outputs, need, numbers, parser
from kvloom.loadtest.study.intervals import bootstrap, exponential, wilson
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.study.runner import Steps, finish
from kvloom.loadtest.workloads.corpus import TextSource

COLUMNS = (
    Column("server", "base_url"),
    Column("model", "model"),
    Column("context", "context"),
    Column("tokens", "n"),
    Column("perplexity", "ppl", ".3f"),
    Column("bits per byte", "bits_per_byte", ".4f"),
    Column("reference's perplexity", "ppl_dense", ".3f"),
    Column("KL, at least", "kl_mean", ".4f"),
    Column("top-1", "top1", ".1%"),
    Column("needle", "needle", ".1%"),
    Column("trials", "needle_trials"),
    Column("reference's", "needle_dense", ".1%"),
)


def perplexity(scored: Sequence[Scored], texts: Sequence[str]) -> Row:
    """Of all texts together, with the interval over texts."""
    losses = [-value for one in scored for value in one.logprobs]
    blocks = [i for i, one in enumerate(scored) for _ in one.logprobs]
    size = sum(len(text.encode()) for text in texts)
    return {
        "n": len(losses),
        "ppl": math.exp(sum(losses) / len(losses)),
        "ppl_ci": exponential(bootstrap(losses, blocks)),
        "bits_per_byte": sum(losses) / math.log(2) / size,
    }


def agreement(reference: Sequence[Scored], scored: Sequence[Scored]) -> Row:
    """Of two servers over the same tokens. Raises ConfigError if they cut the texts differently."""
    if any(a.tokens != b.tokens for a, b in zip(reference, scored)):
        raise ConfigError("the two servers cut the same text into different tokens; compare models with the same tokenizer")
    pairs = [(i, a, b) for i, (x, y) in enumerate(zip(reference, scored)) for a, b in zip(x.top, y.top) if a and b]
    if not pairs:
        raise ConfigError("a server lists no likeliest tokens; it must answer logprobs with top_logprobs")
    blocks = [i for i, _, _ in pairs]
    kl = [coarse_divergence(a, b) for _, a, b in pairs]
    same = [float(likeliest(a) == likeliest(b)) for _, a, b in pairs]
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_mean_ci": bootstrap(kl, blocks),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(np.mean(same)),
        "top1_ci": bootstrap(same, blocks),
        "ppl_dense": math.exp(-sum(v for one in reference for v in one.logprobs) / sum(len(one.logprobs) for one in reference)),
    }


class Study:
    """One context length on one server, or on two."""

    def __init__(self, args: argparse.Namespace, source: TextSource, context: int, steps: Steps) -> None:
        self._args, self._context, self._steps = args, context, steps
        self._texts = [source.decode(source.tokens(context, f"{args.seed} {i}")) for i in range(args.windows)]
        text = source.tokens(max(context, source.size), str(args.seed))
        found = trials("needle", source.tokenizer, text, context, args.haystacks, args.seed) if args.haystacks else []
        self._trials: list[tuple[Trial, str]] = [(t, source.decode([*t.prompt, *t.question])) for t in found]

    async def measure(self, row: Row, server: Completions, reference: Completions | None) -> None:
        """Fill a row, as far as it comes."""
        scored = await self._score(server)
        row |= perplexity(scored, self._texts)
        if reference is not None:
            row |= agreement(await self._score(reference), scored)
        if self._trials:
            right = await self._needle(server)
            row |= {"needle": float(np.mean(right)), "needle_ci": wilson(sum(right), len(right))}
            row["needle_trials"] = len(right)
            if reference is not None:
                row["needle_dense"] = float(np.mean(await self._needle(reference)))

    async def _score(self, server: Completions) -> list[Scored]:
        self._steps.name(f"{self._context} tokens: perplexity")
        return await all_of([server.score(text, self._args.top) for text in self._texts], self._steps.done)

    async def _needle(self, server: Completions) -> list[float]:
        self._steps.name(f"{self._context} tokens: needles")
        jobs = [server.complete(prompt, trial.room) for trial, prompt in self._trials]
        return [trial.score(said) for (trial, _), said in zip(self._trials, await all_of(jobs, self._steps.done))]


async def run(args: argparse.Namespace, source: TextSource, results: Results) -> None:
    """Measure every context; a row is kept even if it stops half-way, with what it has."""
    contexts = numbers(args.contexts, "--contexts")
    key: dict[str, Any] = {"api_key": args.api_key, "concurrency": args.concurrency}
    servers = 2 if args.reference_url else 1
    reference = args.reference_url or args.base_url, args.reference_model or args.model
    with Steps(len(contexts) * servers * (args.windows + NEEDLES * args.haystacks)) as steps:
        async with (
            Completions(args.base_url, args.model, extra=args.kv and {"kv": args.kv}, **key) as server,
            Completions(*reference, **key) as other,
        ):
            for context in contexts:
                row: Row = {"base_url": args.base_url, "model": args.model, "method": "server", "options": args.kv or {},
                            "context": context, "batch": args.concurrency, "machine": describe()}  # fmt: skip
                try:
                    await Study(args, source, context, steps).measure(row, server, other if args.reference_url else None)
                finally:
                    if "ppl" in row:
                        results.add(row)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("eval server", __doc__)
    made.add_argument("--base-url", required=True, help="such as http://127.0.0.1:8000, without /v1")
    made.add_argument("--model", required=True, help="its name in the server's API")
    made.add_argument("--reference-url", help="a second server to compare with")
    made.add_argument("--reference-model", help="its model (default: --model)")
    made.add_argument("--api-key", help="sent to both servers as a bearer token")
    made.add_argument("--kv", help='JSON object sent as the request field "kv" to --base-url')
    add(made, ("tokenizer", "smollm2", "cuts the texts to length: built-in name, folder or .gguf"), kind=str)
    add(made, ("contexts", "1000", "tokens of a text"), kind=str)
    add(made, ("windows", 8, "texts per context"))
    add(made, ("haystacks", 2, "with 8 needles each; 0 for none"), kind=int)
    add(made, ("top", 5, "likeliest tokens to ask for, 5 with OpenAI's limit"), ("concurrency", 4, "requests at once"))
    made.add_argument("--seed", type=int, default=0)
    add_outputs(made)
    args = made.parse_args(argv)
    args.kv = json_object("--kv", args.kv, '{"selection": "sink_window"}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code. Raises ServerError after writing what there is."""
    args = parse(argv)
    need("aiohttp")
    source = TextSource.load(args.tokenizer)
    note = f"Text: Python's reference, fingerprint {source.fingerprint}. In brackets: 95% intervals over texts. {describe()}."
    identity, files = ("base_url", "model", "options", "context"), (args.json, args.markdown, args.publish)
    results = Results(COLUMNS, identity, "Quality of a server", *files, note)
    return finish(results, lambda: asyncio.run(run(args, source, results)))
