"""Sparse drafting with dense verification: is the output that of dense decoding, and where does it pay?

    kvloom eval drafts [MODEL] [--dtype fp32] [--weights bf16] [--prompts 200] [--cases 1x2048,8x4096] [--json FILE --resume]

Identity: greedy continuations of real text with and without drafting, of the same requests in the same batches. Where they
differ, the first difference is shown with both tokens' log-probabilities under the dense model: a near tie, or a defect.
Speed: milliseconds per token of the same requests, dense and every draft in turns, so that a busy machine hits all of them;
acceptance from the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from kvloom.engine import LLM, SamplingParams
from kvloom.engine.errors import ConfigError
from kvloom.engine.llm import Completion
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.selection import METHODS
from kvloom.loadtest.figures import publish
from kvloom.loadtest.quality.text import reference_text, windows
from kvloom.loadtest.study.flags import add, add_engine, add_model, add_outputs, add_resume, numbers, parser
from kvloom.loadtest.study.results import Column, Row, cells, table
from kvloom.loadtest.study.runner import about, console, described

TOGETHER = 16
"""Requests of the identity check that run at once."""
TOP = 20
"""Log-probabilities that dense continuations come with: a drafted token beyond them is no near tie."""
PRECISION = (Column("dtype", "dtype"), Column("weights", "weights"), Column("method", "method"), Column("budget", "budget"))
IDENTITY_COLUMNS = (
    *PRECISION,
    Column("draft tokens", "draft_tokens"),
    Column("prompts", "prompts"),
    Column("prompt tokens", "prompt_tokens"),
    Column("generated", "tokens"),
    Column("identical", "identical"),
    Column("largest gap", "largest_gap", ".4f"),
    Column("accepted", "accepted", ".0%"),
)
DIFFERENCE_COLUMNS = (
    *PRECISION,
    Column("prompt", "prompt"),
    Column("after tokens", "position"),
    Column("dense's token", "dense"),
    Column("drafted run's", "drafted"),
    Column("log-probability", "logprob", ".4f"),
    Column("gap", "gap", ".4f"),
)
SPEED_COLUMNS = (
    *PRECISION,
    Column("batch", "batch"),
    Column("context", "context"),
    Column("draft tokens", "draft_tokens"),
    Column("accepted", "accepted", ".0%"),
    Column("dense ms per token", "dense_ms", ".1f"),
    Column("drafted ms", "drafted_ms", ".1f"),
    Column("speed-up", "speed_up", ".2f"),
)
SETTINGS = ("model", "dtype", "weights", "method", "budget", "draft_tokens", "prompts", "prompt_tokens", "tokens", "batch",
            "context")  # fmt: skip
"""What tells one row from another."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a drafted continuation first leaves the dense one."""

    prompt: int
    """Its number."""
    position: int
    """Generated tokens before it."""
    dense: str
    drafted: str
    logprob: float
    """Of dense's token, under dense."""
    gap: float
    """Less that of the drafted run's token, under dense: the nearer to 0, the nearer to a tie."""


def greedy(tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)


def acceptance(results: Sequence[Completion]) -> float:
    """Accepted over drafted tokens; NaN if nothing was drafted."""
    used = [result.usage for result in results if result.usage is not None]
    drafted = sum(usage.drafted_tokens for usage in used)
    return sum(usage.accepted_tokens for usage in used) / drafted if drafted else float("nan")


def difference(llm: LLM, prompt: int, dense: Completion, drafted: Completion) -> Difference | None:
    """The first one; None if there is none. `dense` has log-probabilities."""
    for position, (entry, other) in enumerate(zip(dense.logprobs, drafted.tokens)):
        if entry.token != other:
            known = dict(entry.top).get(other)
            gap = float("inf") if known is None else entry.logprob - known
            ours, theirs = (repr(llm.tokenizer.decode([token])) for token in (entry.token, other))
            return Difference(prompt, position, ours, theirs, entry.logprob, gap)
    return None


def identities(llm: LLM, prompts: Sequence[list[int]], tokens: int, drafts: Sequence[KVOptions]) -> Iterator[Row]:
    """Compare every kind of drafting on all prompts with one dense run of them, batch by batch."""
    found: list[list[Difference]] = [[] for _ in drafts]
    made: list[list[Completion]] = [[] for _ in drafts]
    for first in range(0, len(prompts), TOGETHER):
        batch = prompts[first : first + TOGETHER]
        plain = llm.generate(batch, greedy(tokens, logprobs=TOP))
        for differences, completions, kv in zip(found, made, drafts):
            completions += llm.generate(batch, greedy(tokens), kv=kv)
            pairs = enumerate(zip(plain, completions[first:]), first)
            differences += filter(None, (difference(llm, number, a, b) for number, (a, b) in pairs))
        console.print(f"{first + len(batch)} prompts: {sum(map(len, found))} differences")
    for differences, completions, kv in zip(found, made, drafts):
        yield {
            "method": kv.selection, "budget": kv.budget, "draft_tokens": kv.draft_tokens,
            "prompts": len(prompts), "prompt_tokens": len(prompts[0]), "tokens": tokens,
            "identical": len(prompts) - len(differences),
            "largest_gap": max((one.gap for one in differences), default=None),
            "accepted": acceptance(completions),
            "differences": [asdict(one) for one in differences],
        }  # fmt: skip


def per_token_ms(llm: LLM, prompts: Sequence[list[int]], tokens: int, kv: KVOptions) -> tuple[float, float]:
    """Milliseconds per token of decoding all prompts together, and the acceptance. Prompts come from the prefix cache."""
    began = time.perf_counter()
    llm.generate(prompts, greedy(1), kv=kv)
    first = time.perf_counter() - began
    began = time.perf_counter()
    results = llm.generate(prompts, greedy(tokens), kv=kv)
    return (time.perf_counter() - began - first) / (tokens - 1) * 1e3, acceptance(results)


def speeds(llm: LLM, prompts: Sequence[list[int]], tokens: int, drafts: Sequence[KVOptions], rounds: int) -> Iterator[Row]:
    """One batch and context: dense and every kind of drafting, in turns; medians over rounds."""
    llm.generate(prompts, greedy(1))  # into the prefix cache
    plain: list[float] = []
    times: list[list[float]] = [[] for _ in drafts]
    accepted = [0.0] * len(drafts)
    for _ in range(rounds):
        plain.append(per_token_ms(llm, prompts, tokens, KVOptions())[0])
        for i, kv in enumerate(drafts):
            ms, accepted[i] = per_token_ms(llm, prompts, tokens, kv)
            times[i].append(ms)
    dense = statistics.median(plain)
    for i, kv in enumerate(drafts):
        drafted = statistics.median(times[i])
        yield {
            "method": kv.selection, "budget": kv.budget, "draft_tokens": kv.draft_tokens, "tokens": tokens,
            "batch": len(prompts), "context": len(prompts[0]), "accepted": accepted[i],
            "dense_ms": dense, "drafted_ms": drafted, "speed_up": dense / drafted,
        }  # fmt: skip


class Report:
    """Rows of both kinds, on disk and in print."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._json, self._markdown = args.json, args.markdown
        self.identity: list[Row] = []
        self.speed: list[Row] = []
        if args.resume and args.json is not None and args.json.exists():
            known = json.loads(args.json.read_text())
            self.identity, self.speed = known["identity"], known["speed"]

    def add(self, rows: list[Row], row: Row) -> None:
        """Take a row in, in place of one of the same settings, and write the files."""
        rows[:] = [known for known in rows if any(known.get(key) != row.get(key) for key in SETTINGS)] + [row]
        if self._json is not None:
            self._json.write_text(json.dumps({"identity": self.identity, "speed": self.speed}, indent=1) + "\n")
        if self._markdown is not None:
            self._markdown.write_text(self.text() + "\n")

    def text(self) -> str:
        """Three tables: identity, every difference, speed; what was not measured is left out."""
        differences = [{**row, **one} for row in self.identity for one in row["differences"]]
        kinds = (IDENTITY_COLUMNS, self.identity), (DIFFERENCE_COLUMNS, differences), (SPEED_COLUMNS, self.speed)
        return "\n\n".join(table(columns, rows) for columns, rows in kinds if rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    args = parse(argv)
    settings = {"dtype": args.dtype, "weights": args.weights, "kv_memory": args.kv_memory, "threads": args.threads}
    llm = LLM(args.model, device="cpu", **settings)
    text = llm.tokenizer.encode(reference_text())
    report = Report(args)
    for rows, row in measured(llm, text, args, report):
        report.add(rows, {**row, **about(llm)})
    console.print(f"{report.text()}\n\n{described(llm)}", soft_wrap=True, markup=False)
    for kind, columns, rows in (("exact", IDENTITY_COLUMNS, report.identity), ("speed", SPEED_COLUMNS, report.speed)):
        if args.publish is not None and rows:
            publish(args.publish.with_stem(f"{args.publish.stem}-{kind}"), *cells(columns, rows), described(llm))
    return 0


def measured(llm: LLM, text: list[int], args: argparse.Namespace, report: Report) -> Iterator[tuple[list[Row], Row]]:
    """Every row, with the list that it belongs to."""

    def drafts(budget: int, counts: Sequence[int]) -> list[KVOptions]:
        methods = [(name, METHODS[name].takes_budget(METHODS[name].options())) for name in args.methods.split(",")]
        return [
            KVOptions(selection=name, budget=budget if takes_budget else None, draft=True, draft_tokens=count)
            for name, takes_budget in methods
            for count in counts
        ]

    if args.prompts:
        prompts = windows(text, args.prompt_tokens, args.prompts)
        for row in identities(llm, prompts, args.tokens, drafts(args.identity_budget, [4])):
            yield report.identity, row
    for case in filter(None, args.cases.split(",")):
        batch, context = map(int, case.split("x"))
        console.print(f"speed: {case}")
        kinds = drafts(args.budget, numbers(args.draft_tokens, "--draft-tokens"))
        for row in speeds(llm, windows(text, context, batch), args.tokens, kinds, args.rounds):
            yield report.speed, row
        llm.core.cache.evict()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("eval drafts", __doc__, allow_abbrev=True)
    add_model(made)
    add_engine(made, leave_out=("backend",))
    add(made, ("methods", ",".join(METHODS), ""), kind=str)
    add(made, ("budget", 512, "of the speed cases"))
    add(made, ("draft-tokens", "2,4,8", "of the speed cases"), kind=str)
    add(made, ("cases", "1x2048,1x7500,8x2048,8x7500", "batch x context"), kind=str)
    add(made, ("rounds", 3, "dense and drafted in turn"))
    add(made, ("prompts", 200, "to compare texts on; 0 for none"), kind=int)
    add(
        made,
        ("prompt-tokens", 400, "length of each"),
        ("identity-budget", 64, "budget of that comparison"),
        ("tokens", 32, "generated per prompt"),
    )
    add_outputs(made, table="write the tables into this file")
    add_resume(made, "add to the rows that --json holds already")
    args = made.parse_args(argv)
    if unknown := [method for method in args.methods.split(",") if method not in METHODS]:
        made.error(f"method {unknown[0]!r} is not known; allowed: {', '.join(METHODS)}")
    if args.resume and args.json is None:
        raise ConfigError("--resume needs --json FILE, which holds what was measured")
    return args
