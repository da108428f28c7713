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
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.loadtest.quality import spec, text
from kvloom.loadtest.quality.decoding import prefill
from kvloom.loadtest.quality.divergence import BLOCK
from kvloom.loadtest.quality.spec import MethodSpec, plan
from kvloom.loadtest.quality.tasks import ask, haystacks, trials
from kvloom.loadtest.study import runner
from kvloom.loadtest.study.flags import add, numbers
from kvloom.loadtest.study.intervals import bootstrap, exponential
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, Steps, Study, command, described

SCORED = 1024
"""Last tokens of a context that its perplexity is taken over."""
ROOM = 64
"""Tokens of a question and its answer behind the longest context."""
METHODS = "dense,token_select:prefill_budget=1024,token_select:prefill_budget=1024:positions=reindexed"
Losses = npt.NDArray[np.float64]


def engine(args: argparse.Namespace, specs: Sequence[MethodSpec], longest: int) -> LLM:
    """An engine for `longest` tokens and what follows them, whose limit for true positions is lifted.

    Raises ConfigError if no method goes beyond the trained length and `longest` does.
    """
    beyond = next((one for one in specs if one.options.get("positions") == "reindexed"), None)
    if beyond is None:
        last = METHODS.rpartition(",")[2]
        raise ConfigError(f"--methods {args.methods} has none with re-indexed positions; add one, such as {last}")
    selection = {"selection": beyond.method, "budget": beyond.budget, "selection_options": json.dumps(beyond.options)}
    made = runner.engine(args, max_model_len=longest + ROOM, **selection)
    spec.check(made, specs)
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


class Extrapolation(Study):
    """Measures methods one by one, each at every context."""

    title = "Beyond the trained length"
    columns = (
        Column("context", "context"),
        Column("method", "method"),
        Column("positions", "positions"),
        Column("budget", "budget"),
        Column("options", "options"),
        Column("needle", "accuracy", ".1%"),
        Column("questions", "trials"),
        Column("perplexity", "ppl", ".1f"),
    )
    identity = ("model", "dtype", "weights", "method", "budget", "options", "context", "haystacks", "texts", "seed")
    sort_by = "context"

    @staticmethod
    def add_flags(made: argparse.ArgumentParser) -> None:
        spec.add_flags(made)
        made.set_defaults(methods=METHODS, budgets="1024")
        add(made, ("contexts", "8000,11264,12288", "lengths to measure at, comma-separated"), kind=str)
        add(made, ("haystacks", 2, "texts with 8 needles each"), ("texts", 3, "texts for the perplexity"))

    def __init__(self, args: argparse.Namespace) -> None:
        specs, contexts = plan(args.methods, args.budgets, baseline=False), numbers(args.contexts, "--contexts")
        self.args, self.llm = args, engine(args, specs, max(contexts))
        self.cases = [
            Case((one, context), f"{one.label}: needles in {context}",
                 {"context": context, **one.row, "positions": one.options.get("positions", "true")}, one.label)
            for one in specs for context in contexts
        ]  # fmt: skip
        tokens = text.real_text(self.llm, args.text)
        try:
            self.texts = text.windows(tokens, max(contexts), args.texts)
        except ValueError as error:
            raise ConfigError(f"{error}; lower --texts or --contexts") from None
        self.trials = {n: trials("needle", self.llm.tokenizer, tokens, n, args.haystacks, args.seed) for n in contexts}
        self.note = (
            f"Perplexity over the last {SCORED} tokens of a context, {args.texts} texts; {args.haystacks} haystacks, 8 "
            f"questions. In brackets: 95% intervals, by bootstrap over blocks of {BLOCK} tokens and Wilson's. "
            f"{described(self.llm)}"
        )

    def preparations(self, group: Hashable) -> int:
        return int(self.args.texts)

    def measurements(self, case: Case) -> int:
        return int(self.args.haystacks) - (-len(self.trials[case.what[1]]) // int(self.args.batch))

    def prepare(self, group: Hashable, steps: Steps) -> None:
        method = next(case.what[0] for case in self.cases if case.group == group)
        self.llm.core.cache.evict()
        self._scored: list[Losses] = []
        for one in self.texts:
            steps.name(f"{group}: perplexity")
            self._scored.append(losses(self.llm, one, method.kv))
            steps.done()

    def measure(self, case: Case, steps: Steps) -> Row:
        """Haystacks go into the prefix cache first, so that questions which run together share them."""
        method, context = case.what
        asked = self.trials[context]
        prefill(self.llm, haystacks(asked), steps.done, method.kv)
        answers = ask(self.llm, asked, method.kv, self.args.batch, steps.done)
        return {**perplexity(self._scored, context), **answers.figures()}


main = command("eval extrapolation", Extrapolation)
