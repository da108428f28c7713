"""Beyond the trained length: what re-indexed positions keep that true ones lose.

    kvloom eval extrapolation [MODEL] [--contexts 8000,11264,12288] [--haystacks 2] [--texts 3] [--json FILE] [--markdown FILE]

    needle       planted facts at evenly spread depths of `context` tokens; the question is fed through the decode path
    perplexity   real text in one prompt: tokens [context - 1024, context), each from its own prompt row

The engine refuses requests beyond the trained length unless their selection keeps positions within it. Here that limit is
lifted for the methods that stand beside: the table shows what the limit is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.request import KVOptions
from kvloom.loadtest.quality import setup
from kvloom.loadtest.quality.answers import ask
from kvloom.loadtest.quality.divergence import BLOCK
from kvloom.loadtest.quality.spec import MethodSpec, check, parse_numbers, plan
from kvloom.loadtest.quality.tasks import haystacks, trials
from kvloom.loadtest.study.intervals import bootstrap, exponential
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.workloads.corpus import windows

SCORED = 1024
"""Last tokens of a context that its perplexity is taken over."""
ROOM = 64
"""Tokens of a question and its answer behind the longest context."""
METHODS = "dense,token_select:prefill_budget=1024,token_select:prefill_budget=1024:positions=reindexed"
COLUMNS = (
    Column("context", "context"),
    Column("method", "method"),
    Column("positions", "positions"),
    Column("budget", "budget"),
    Column("options", "options"),
    Column("needle", "accuracy", ".1%"),
    Column("questions", "trials"),
    Column("perplexity", "ppl", ".1f"),
)
IDENTITY = ("model", "dtype", "weights", "method", "budget", "options", "context", "haystacks", "texts", "seed")
Losses = npt.NDArray[np.float64]


def engine(args: argparse.Namespace, specs: Sequence[MethodSpec], longest: int) -> LLM:
    """An engine for `longest` tokens and what follows them, whose limit for true positions is lifted.

    Raises ConfigError if no method goes beyond the trained length and `longest` does.
    """
    beyond = next((spec for spec in specs if spec.options.get("positions") == "reindexed"), None)
    if beyond is None:
        raise ConfigError(
            f"--methods {args.methods} has none with re-indexed positions; add one, such as the last of {METHODS}"
        )
    made = LLM(
        args.model,
        dtype=args.dtype,
        weights=args.weights,
        backend=args.backend,
        kv_memory=args.kv_memory,
        threads=args.threads,
        max_model_len=longest + ROOM,
        selection=beyond.method,
        budget=beyond.budget,
        selection_options=json.dumps(beyond.options),
        shadow_interval=0,
    )
    check(made, specs)
    made.core.limits = made.core.limits._replace(trained_len=longest + ROOM)
    return made


def losses(llm: LLM, text: Sequence[int], kv: KVOptions) -> Losses:
    """Negative log-probability of every token but the first, from prompt rows: [len(text) - 1]."""
    (found,) = llm.generate([list(text)], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), kv=kv)
    assert found.prompt_logprobs is not None
    return np.array([-entry.logprob for entry in found.prompt_logprobs if entry is not None])


def perplexity(texts: Sequence[Losses], context: int) -> Row:
    """Over the last tokens of a context, with a 95% interval by bootstrap over blocks of them."""
    parts = [loss[max(0, context - SCORED - 1) : context - 1] for loss in texts]
    blocks = np.concatenate([i * 1_000_000 + np.arange(len(part)) // BLOCK for i, part in enumerate(parts)])
    values = np.concatenate(parts)
    return {"ppl": float(np.exp(values.mean())), "ppl_ci": exponential(bootstrap(values, blocks)), "n": len(values)}


class Study:
    """Measures specs one by one, each at every context."""

    def __init__(self, llm: LLM, args: argparse.Namespace, contexts: Sequence[int]) -> None:
        self.llm, self.args, self.contexts = llm, args, contexts
        text = setup.real_text(llm, args.text)
        try:
            self.texts = windows(text, max(contexts), args.texts)
        except ValueError as error:
            raise ConfigError(f"{error}; lower --texts or --contexts") from None
        self.trials = {
            context: trials("needle", llm.tokenizer, text, context, args.haystacks, args.seed) for context in contexts
        }

    @property
    def measurements(self) -> int:
        """Steps of the progress bar per spec."""
        batches = sum(-(-len(asked) // self.args.batch) for asked in self.trials.values())
        return self.args.texts + batches + len(self.contexts) * self.args.haystacks

    def row(self, spec: MethodSpec, context: int) -> Row:
        """The row's settings, before anything is measured."""
        settings = {key: getattr(self.args, key) for key in ("haystacks", "texts", "seed")}
        method = {"method": spec.method, "budget": spec.budget, "options": dict(spec.options)}
        positions = spec.options.get("positions", "true")
        return {"context": context, **method, "positions": positions, **settings, **setup.about(self.llm)}

    def measure(self, spec: MethodSpec, results: Results, steps: setup.Steps) -> None:
        """Add a row for every context."""
        steps.name(f"{spec.label}: perplexity")
        scored = []
        for text in self.texts:
            scored.append(losses(self.llm, text, spec.kv))
            steps.done()
        for context in self.contexts:
            steps.name(f"{spec.label}: needles in {context}")
            results.add({**self.row(spec, context), **perplexity(scored, context), **self._needles(spec, context, steps)})
        self.llm.core.cache.evict()

    def _needles(self, spec: MethodSpec, context: int, steps: setup.Steps) -> Row:
        """Haystacks go into the prefix cache first, so that questions which run together share them."""
        asked = self.trials[context]
        for prompt in haystacks(asked):
            self.llm.generate([list(prompt)], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), kv=spec.kv)
            steps.done()
        return ask(self.llm, asked, spec.kv, self.args.batch, steps.done).figures()


def run(study: Study, specs: Sequence[MethodSpec], results: Results) -> None:
    """Measure every spec of which the results lack a row."""
    missing = [s for s in specs if any(results.find(study.row(s, context)) is None for context in study.contexts)]
    with setup.Steps(len(missing) * study.measurements) as steps:
        for spec in missing:
            study.measure(spec, results, steps)
    results.rows.sort(key=lambda row: row["context"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = setup.parser("extrapolation", __doc__)
    parser.set_defaults(methods=METHODS, budgets="1024")
    parser.add_argument(
        "--contexts", default="8000,11264,12288", help="lengths to measure at, comma-separated (default: %(default)s)"
    )
    for name, default, text in (("haystacks", 2, "texts with 8 needles each"), ("texts", 3, "texts for the perplexity")):
        parser.add_argument(f"--{name}", type=setup.count, default=default, help=f"{text} (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    specs, contexts = plan(args.methods, args.budgets, baseline=False), parse_numbers(args.contexts, "--contexts")
    llm = engine(args, specs, max(contexts))
    note = (
        f"Perplexity over the last {SCORED} tokens of a context, {args.texts} texts; {args.haystacks} haystacks, 8 questions. "
        f"In brackets: 95% intervals, by bootstrap over blocks of {BLOCK} tokens and Wilson's. {setup.described(llm)}"
    )
    results = Results(COLUMNS, IDENTITY, "Beyond the trained length", args.json, args.markdown, args.publish, note)
    if args.resume:
        results.resume()
    study = Study(llm, args, contexts)
    return setup.finish(results, lambda: run(study, specs, results))


if __name__ == "__main__":
    sys.exit(main())
