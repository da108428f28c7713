"""Approximate reuse of KV: what it costs in quality and what it gains in time to the first token, in one run.

    kvloom eval kvshare --policies naive,boundary,blend --ratios 0.1,0.15,0.3 --donors both --json rows.json --markdown table.md

Prompts are documents in another order than their donor had them, with a new one and a question (`reuse_prompts`). Answers of
full passes are followed token by token with reused KV (KL, top-1), then prompts are answered freely (accuracy), then both ways
of computing the same prompt are timed in turns. What is measured leaves nothing behind, and the exact prefix cache is empty.

    recomputed   share of the tokens found in donors that were computed all the same
    KL less      than as copied, and than the policy random at the same ratio, paired by prompt: below 0 is better
    of its ratio the policy with the lowest KL, and which others cannot be told apart from it on these prompts (the interval of
                 the difference, prompt by prompt, holds 0)

With --charge also: after how many uses reuse has paid for what it took to have something to reuse. Times to the first token of
all uses so far, beside the same with full passes, production charged in front. In context, the donor's prompt was computed for
its own sake, and copying its KV out is what reuse adds; isolated, every document is computed once more, alone, and copied out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.reuse.kvshare.options import POLICIES, RepairOptions
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.engine.settings.options import json_object
from kvloom.loadtest.quality.decoding import greedy, under_way
from kvloom.loadtest.quality.reuse_runs import (
    KINDS,
    Case,
    Maker,
    Reference,
    Sample,
    Times,
    check_length,
    compare,
    donate,
    race,
    reference,
)
from kvloom.loadtest.quality.reuse_scores import EVERYTHING, NAIVE, Setting, Trend, figures, relate, settings, trends
from kvloom.loadtest.study import runner
from kvloom.loadtest.study.flags import add, add_engine, add_model, add_outputs, add_resume, listed, parser
from kvloom.loadtest.study.results import Column, Results, Row
from kvloom.loadtest.study.runner import described

CHARGE_COLUMNS = (
    Column("donors", "donors"),
    Column("uses", "uses"),
    Column("production ms", "production_ms", ".1f"),
    Column("full passes, ms in all", "exact_ms", ".0f"),
    Column("KVShare with production, ms in all", "share_ms", ".0f"),
    Column("of full", "cost_share", ".2f"),
    Column("has paid", "paid"),
)
CHARGE_IDENTITY = ("model", "dtype", "weights", "donors", "uses", "policy", "ratio", "boundary", "documents", "document_len",
                   "sets", "seed", "kvshare_options", "corpus")  # fmt: skip


class Charged(NamedTuple):
    """One case."""

    production: float
    """Seconds."""
    times: Times
    """Of its uses, in order."""


def charge(llm: LLM, case: Case, kind: str, options: Mapping[str, Any]) -> Charged:
    """Produce donors and use them, once by every use of the case, with and without reuse in turns."""
    production, times = produce(llm, case, kind), Times([], [])
    for use in case.uses:
        race(llm, use, options, 1, times)
    return Charged(production, times)


def produce(llm: LLM, case: Case, kind: str) -> float:
    """As `donate`; returns the seconds that nobody would have spent without reuse."""
    if kind == "isolated":
        llm.core.purge("")
        began = time.perf_counter()
        donate(llm, case, kind)
        return time.perf_counter() - began
    core = llm.core
    core.purge("")
    core.cache.evict()
    request = greedy("donor", case.donor, 2, KVOptions(reuse="approx"))
    with under_way(llm, [request]):
        while request.generated == 0:
            core.step()
        share = core.feature(KVShare)
        assert share is not None
        began = time.perf_counter()
        share.stepping()  # what the next step would do first: copy out
        return time.perf_counter() - began


def cumulative(found: Sequence[Charged]) -> list[Row]:
    """A row for every number of uses: medians over cases of the sums up to there."""
    production = [one.production for one in found]
    exact, share = (np.cumsum([getattr(one.times, name) for one in found], axis=1) for name in ("exact", "approximate"))
    rows = []
    for uses in range(1, exact.shape[1] + 1):
        full, reusing = np.median(exact[:, uses - 1]), np.median(share[:, uses - 1] + production)
        rows.append({
            "uses": uses, "production_ms": float(np.median(production)) * 1e3, "exact_ms": float(full) * 1e3,
            "share_ms": float(reusing) * 1e3, "cost_share": float(reusing / full), "paid": "yes" if reusing < full else "no",
        })  # fmt: skip
    return rows


COLUMNS = (
    Column("donors", "donors"),
    Column("policy", "policy"),
    Column("ratio", "ratio"),
    Column("recomputed", "recompute_share", ".1%"),
    Column("found", "matched_share", ".1%"),
    Column("answer tokens", "n"),
    Column("KL", "kl_mean", ".4f"),
    Column("KL p99", "kl_p99", ".3f"),
    Column("top-1", "top1", ".1%"),
    Column("right", "accuracy", ".0%"),
    Column("right, full pass", "accuracy_exact", ".0%"),
    Column("TTFT ms", "ttft_ms", ".0f"),
    Column("full pass ms", "ttft_exact_ms", ".0f"),
    Column("speed-up", "speed_up", ".2f"),
    Column("KL less naive", "kl_less_naive", "+.4f"),
    Column("KL less random", "kl_less_random", "+.4f"),
    Column("KL above the lowest", "kl_above_best", "+.4f"),
    Column("of its ratio", "best"),
)
SIZES = ("documents", "document_len", "prompts", "answer_len", "seed")
IDENTITY = ("model", "dtype", "weights", "donors", "policy", "ratio", "boundary", *SIZES, "kvshare_options", "corpus")
CHARGE_USES = 8
SERVED = RepairOptions()
"""What requests get unless they say otherwise."""


def engine(args: argparse.Namespace) -> LLM:
    """A model that may reuse approximately, verified or not, even where it costs time; nothing else goes on beside.

    What deviates is not refused, so that every row is about the same tokens. Raises ModelError or ConfigError.
    """
    given = json_object("--kvshare-options", args.kvshare_options, '{"min_match": 32}')
    fixed = {"verified": True, "heal": False, "shadow_share": 0.0}
    return runner.engine(args, kvshare_options=json.dumps({"min_gain": -1.0, "reject_above": 1000, **given, **fixed}))


class Study:
    """Measures settings on one model, prompt by prompt."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self.llm, self.args = llm, args
        self.maker = Maker(llm, args.documents, args.document_len, text=args.text, seed=args.seed)
        check_length(llm, self.maker.case(0), args.answer_len)
        self._exact: dict[int, Reference] = {}

    @cached_property
    def about(self) -> Row:
        """What all rows share."""
        sizes = {key: getattr(self.args, key) for key in SIZES}
        return sizes | {"corpus": self.maker.fingerprint, "kvshare_options": self.args.kvshare_options} | runner.about(self.llm)

    def identity(self, donors: str, setting: Setting) -> Row:
        return {"donors": donors, **setting._asdict(), **self.about}

    def own(self, results: Results, prompts: int) -> list[Row]:
        """Rows of the first so many prompts on this model: those that can be compared with each other."""
        shared = {key: self.about[key] for key in IDENTITY if key in self.about} | {"prompts": prompts}
        return [row for row in results.rows if all(row.get(key) == value for key, value in shared.items())]

    def measure(self, donors: str, chosen: Sequence[Setting], steps: runner.Steps) -> Iterator[list[Row]]:
        """Every setting on one prompt after another, so that all share its donors and its full pass. Rows of the prompts so far
        after each: they can be compared pair by pair whenever it is stopped."""
        samples: defaultdict[Setting, list[Sample]] = defaultdict(list)
        times = {setting: Times([], []) for setting in chosen}
        for number in range(self.args.prompts):
            case = self.maker.case(number)
            use = case.uses[0]
            donate(self.llm, case, donors)
            if number not in self._exact:
                self._exact[number] = reference(self.llm, use, self.args.answer_len)
            for setting in chosen:
                steps.name(f"{donors} donors, prompt {number + 1}, {setting.policy} {setting.ratio:g}")
                samples[setting].append(compare(self.llm, use, self._exact[number], setting.options))
                race(self.llm, use, setting.options, self._turns(number), times[setting])
                steps.done()
            made = self.identity(donors, chosen[0]) | {"prompts": number + 1}
            yield [made | setting._asdict() | figures(samples[setting], times[setting]) for setting in chosen]

    def _turns(self, number: int) -> int:
        """Of a prompt, so that all prompts together have `--rounds`."""
        rounds, prompts = self.args.rounds, self.args.prompts
        return rounds // prompts + (number < rounds % prompts)


def run(study: Study, chosen: Sequence[Setting], kinds: Sequence[str], results: Results) -> None:
    """Measure what the results lack. After Ctrl-C the rows are of the prompts that every setting has answered."""
    known = list(results.rows)
    jobs = [(kind, [s for s in chosen if results.find(study.identity(kind, s)) is None]) for kind in kinds]
    with runner.Steps(sum(len(missing) for _, missing in jobs) * study.args.prompts) as steps:
        for kind, missing in jobs:
            for rows in study.measure(kind, missing, steps) if missing else ():
                results.rows = [*known, *rows]
                relate(study.own(results, rows[0]["prompts"]))
                results.write()
            known = list(results.rows)
    if said := "; ".join(_trend(trend) for trend in trends(study.own(results, study.args.prompts))):
        results.note += f"\n\nRank correlation (Spearman) of KL with the ratio: {said}."


def _trend(trend: Trend) -> str:
    return f"{trend.donors} donors, {trend.policy}: {trend.of_means:+.2f} of means, {trend.of_prompts:+.2f} mean over prompts"


def run_charge(study: Study, kinds: Sequence[str], results: Results) -> None:
    """Measure what donors cost, beside what they save."""
    args = study.args
    setting = Setting(SERVED.policy, SERVED.ratio, args.boundary)
    about = study.about | {"sets": args.charge, **setting._asdict()}
    with runner.Steps(len(kinds) * args.charge) as steps:
        for kind in kinds:
            if results.find({**about, "donors": kind, "uses": CHARGE_USES}) is not None:
                steps.done(args.charge)
                continue
            found = []
            for number in range(args.charge):
                steps.name(f"{kind} donors, set of documents {number + 1}")
                found.append(charge(study.llm, study.maker.case(number, CHARGE_USES), kind, setting.options))
                steps.done()
            for row in cumulative(found):
                results.add({**about, "donors": kind, **row})


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    """What the flags name. Raises ConfigError."""
    policies = [name for name in args.policies.split(",") if name]
    unknown = [name for name in policies if name not in (NAIVE, *POLICIES)]
    if unknown or not policies:
        raise ConfigError(f"--policies is {args.policies!r}; allowed: {', '.join((NAIVE, *POLICIES))}")
    ratios = listed("--ratios", args.ratios, float, lambda ratio: 0 <= ratio <= 1, "numbers from 0 to 1")
    return settings(policies, ratios, args.boundary)


def add_flags(made: argparse.ArgumentParser) -> None:
    """Flags of everything that measures approximate reuse on prompts."""
    add_model(made)
    add_engine(made, kv_memory="2GiB")
    made.add_argument("--kvshare-options", default="{}", help="as in kvloom serve: such as min_match or check_layer")
    add(made, ("document-len", 300, "tokens of each document"), ("answer-len", 24, "tokens of each answer"))
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--text", type=Path, help="a text file to take documents from (default: the Python reference)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("eval kvshare", __doc__)
    add_flags(made)
    add(made, ("documents", 11, "documents of a donor"), ("prompts", 40, "prompts per setting"))
    add(made, ("policies", ",".join((NAIVE, *POLICIES)), ""), ("ratios", "0.05,0.15,0.3,0.5,1", ""), kind=str)
    first = "first tokens of every run that any policy computes (%(default)s)"
    made.add_argument("--boundary", type=int, default=SERVED.boundary, help=first)
    made.add_argument("--donors", choices=(*KINDS, "both"), default="both", help="default: %(default)s")
    add(made, ("rounds", 2, "turns for times per setting, 0 for none"), kind=int)
    paid = f"measure also, on so many sets of documents, after how many of {CHARGE_USES} uses reuse has paid for its donors"
    made.add_argument("--charge", type=int, default=0, metavar="SETS", help=paid)
    add_outputs(made)
    add_resume(made)
    args = made.parse_args(argv)
    for name in ("boundary", "rounds", "charge"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}; allowed: 0 or more")
    return args


def beside(path: Path | None) -> Path | None:
    """Where the second table goes."""
    return None if path is None else path.with_stem(path.stem + "-charge")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = parse(argv)
    chosen, kinds = chosen_settings(args), KINDS if args.donors == "both" else (args.donors,)
    study = Study(engine(args), args)
    note = (
        f"{args.prompts} prompts of {args.documents} documents of {args.document_len} tokens that donors have, and one that "
        f"they have not; answers of {args.answer_len} tokens; every policy with the same settings in one run. "
        f"{NAIVE}: nothing found is computed; {EVERYTHING}: all of it, the "
        f"same for every policy; otherwise up to {args.boundary} tokens at the head of every run come first. Times: medians of "
        f"{args.rounds} turns. In brackets: 95% intervals. {described(study.llm)}"
    )
    results = Results(
        COLUMNS, IDENTITY, "Approximate reuse: quality and time", args.json, args.markdown, args.publish, note
    ).resumed(args.resume)
    code = runner.finish(results, lambda: run(study, chosen, kinds, results))
    if code or not args.charge:
        return code
    about = f"Medians over {args.charge} sets of documents, used in another order every time. {described(study.llm)}"
    json_, markdown, publish = map(beside, (args.json, args.markdown, args.publish))
    charged = Results(CHARGE_COLUMNS, CHARGE_IDENTITY, "What donors cost", json_, markdown, publish, about)
    charged = charged.resumed(args.resume)
    return runner.finish(charged, lambda: run_charge(study, kinds, charged))
