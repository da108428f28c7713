"""May a model be served with approximate reuse? The check that `kv.reuse` "approx" waits for.

    kvloom calibrate kvshare [MODEL] [--prompts 24] [--kl 0.05] [--kl-isolated 0.1] [--top1 0.9]

    identity    copied layer-0 KV is the model's own after moving by several offsets: tokens, indices and rotation are right
    everything  with all found tokens computed, answers are those of a full pass but for rounding
    default     with the policy that requests get unless they say otherwise, KL and top-1 agreement within the bounds, for
                donors in context and for documents that were compiled alone
    deviation   of copied values at the check layer in these benign prompts: its 99th percentile is the least `reject_above`
                that refuses none of them

What passes is stored in the cache folder under the model's fingerprint, with its figures. What fails leaves nothing behind,
and what an earlier check stored stays.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvloom.engine import LLM
from kvloom.engine.calibration import store
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.reuse.kvshare.options import GATE, RepairOptions, ShareOptions
from kvloom.engine.reuse.kvshare.share import KVShare
from kvloom.loadtest.quality.reuse import add_flags, engine
from kvloom.loadtest.quality.reuse_runs import (
    KINDS,
    Maker,
    Sample,
    approximate,
    ask,
    check_length,
    compare,
    donate,
    fitting,
    reference,
)
from kvloom.loadtest.quality.reuse_scores import figures
from kvloom.loadtest.study.flags import FAILED, add, count, parser
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Row, console
from kvloom.loadtest.study.runner import Steps

OFFSETS = (0, 1, 17, -5)
"""By which a text is moved for the identity check; the longest way that the context allows comes in addition."""
EVERYTHING_KL, EVERYTHING_TOP1 = 1e-4, 0.995
"""Bounds when everything found is computed: the noise of computing the same rows in other batches."""
KEPT = ("kl_mean", "kl_mean_ci", "kl_p99", "top1", "top1_ci", "accuracy", "accuracy_exact", "recompute_share", "matched_share",
        "n")  # fmt: skip


class Bounds(NamedTuple):
    """What the default policy must keep to."""

    kl: float
    top1: float


def identity(llm: LLM, maker: Maker) -> list[int]:
    """Offsets by which a text was moved and found to be the model's own at layer 0.

    Raises ConfigError naming the offset if it was not, or if the text was not found.
    """
    share, text = llm.core.feature(KVShare), maker.case(0).documents[0]
    assert share is not None
    front, behind = (maker.case(number).donor for number in (1, 2))
    begin = min(64, len(front))
    tail = front[: share.options.repair.tail]  # the end of a prompt is never reused
    longest = llm.core.limits.max_model_len - begin - len(text) - len(tail) - 1
    checked = [*OFFSETS, *([longest] if longest > max(OFFSETS) else [])]
    llm.core.purge("")
    llm.core.cache.evict()
    llm.generate([[*front[:begin], *text]], SamplingParams(max_tokens=1, temperature=0), kv=KVOptions(reuse="approx"))
    before = share.stats.identity_failures
    for offset in checked:
        console.print(f"layer 0 after moving text by {offset} positions ...")
        filler = (behind * (1 + (begin + offset) // len(behind)))[: begin + offset]
        ran = ask(llm, (*filler, *text, *tail), approximate({"policy": "boundary", "ratio": 0.0, "boundary": 0}), 1)
        runs = (ran.usage.explanation or {}).get("runs", [])
        if share.stats.identity_failures > before:
            raise ConfigError(f"layer 0 of copied KV is not the model's own after moving it by {offset} positions")
        if not ran.usage.reused_tokens or offset not in [run["shift"] for run in runs]:
            raise ConfigError(f"a text that was moved by {offset} positions was not reused; give a larger --document-len")
    return checked


class Measured(NamedTuple):
    """Samples of all prompts with donors of one kind."""

    default: list[Sample]
    everything: list[Sample]


def measure(llm: LLM, maker: Maker, args: argparse.Namespace, default: RepairOptions) -> dict[str, Measured]:
    """Every prompt with the default policy, and with everything computed."""
    found = {kind: Measured([], []) for kind in KINDS}
    own = {name: getattr(default, name) for name in RepairOptions.__dataclass_fields__}
    with Steps(args.prompts * len(KINDS)) as steps:
        for number in range(args.prompts):
            case = maker.case(number)
            exact = reference(llm, case.uses[0], args.answer_len)
            for kind in KINDS:
                steps.name(f"prompt {number + 1}, {kind} donors")
                donate(llm, case, kind)
                found[kind].default.append(compare(llm, case.uses[0], exact, own))
                found[kind].everything.append(compare(llm, case.uses[0], exact, {**own, "ratio": 1.0, "adaptive": False}))
                steps.done()
    return found


def problems(found: dict[str, Measured], bounds: Bounds, isolated_kl: float) -> Iterator[str]:
    """Figures outside their bounds, a sentence each. isolated_kl: what isolated donors may reach: they know no context."""
    for kind, samples in found.items():
        for what, part, (kl, top1) in (
            ("the default policy", samples.default, bounds._replace(kl=isolated_kl) if kind == "isolated" else bounds),
            ("everything computed", samples.everything, Bounds(EVERYTHING_KL, EVERYTHING_TOP1)),
        ):
            row = figures(part)
            if not row["kl_mean"] <= kl:
                yield f"{kind} donors, {what}: mean KL is {row['kl_mean']:.2g}; allowed: up to {kl:g}"
            if not row["top1"] >= top1:
                yield f"{kind} donors, {what}: top-1 agreement is {row['top1']:.1%}; allowed: {top1:.1%} or more"


def suggested(deviations: Sequence[float]) -> float | None:
    """The 99th percentile of benign runs, rounded up to two digits; None if the policy looks at no deviation."""
    return math.ceil(float(np.quantile(deviations, 0.99)) * 100) / 100 if len(deviations) else None


def content(
    llm: LLM, args: argparse.Namespace, default: RepairOptions, offsets: list[int], found: dict[str, Measured]
) -> dict[str, Any]:
    """What is stored."""
    deviations = [mean for samples in found.values() for sample in samples.default for mean in sample.deviation]
    kinds: dict[str, Row] = {}
    for kind, samples in found.items():
        row, full = figures(samples.default), figures(samples.everything)
        kinds[kind] = {key: row[key] for key in KEPT} | {"everything_kl": full["kl_mean"], "everything_top1": full["top1"]}
    return {
        "model": llm.model.name,
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        **{name: getattr(llm.model, name) for name in ("dtype", "weights")},
        **{name: getattr(default, name) for name in ("policy", "ratio", "boundary")},
        "bounds": {"kl": args.kl, "kl_isolated": args.kl_isolated, "top1": args.top1},
        **{name: getattr(args, name) for name in ("prompts", "documents", "document_len", "answer_len", "seed")},
        "identity_offsets": offsets,
        "reject_above": suggested(deviations),
        **kinds,
    }


def show(content: dict[str, Any]) -> None:
    """Print the figures."""
    for kind in KINDS:
        row = content[kind]
        console.print(
            f"{kind} donors: {row['matched_share']:.0%} of prompts found, {row['recompute_share']:.0%} of it computed; KL "
            f"{row['kl_mean']:.4f}, top-1 {row['top1']:.1%}, right answers {row['accuracy']:.0%} ({row['accuracy_exact']:.0%} "
            f"by full passes); with everything computed KL {row['everything_kl']:.2g}, top-1 {row['everything_top1']:.1%}",
            soft_wrap=True,
        )
    if content["reject_above"] is not None:
        console.print(
            f"99% of these runs deviate by up to {content['reject_above']:g} at the check layer: the least that "
            "--kvshare-options reject_above should be",
            soft_wrap=True,
        )


def calibrate(llm: LLM, args: argparse.Namespace) -> Path | None:
    """Measure, print, and store if all is within bounds. Returns the file, or None if something was not."""
    if args.documents is None:
        args.documents = fitting(llm, args.document_len, args.answer_len)
    maker = Maker(llm, args.documents, args.document_len, text=args.text, seed=args.seed)
    check_length(llm, maker.case(0), args.answer_len)
    default = ShareOptions.read(args.kvshare_options).repair
    try:
        offsets = identity(llm, maker)
    except ConfigError as error:
        console.print(f"[red]failed:[/] {error}", soft_wrap=True)
        return None
    console.print(f"layer 0 agrees after moving text by {', '.join(map(str, offsets))} positions")
    found = measure(llm, maker, args, default)
    result = content(llm, args, default, offsets, found)
    show(result)
    wrong = list(problems(found, Bounds(args.kl, args.top1), args.kl_isolated))
    for problem in wrong:
        console.print(f"[red]failed:[/] {problem}", soft_wrap=True)
    return None if wrong else store.write(GATE, llm.core.runner.geometry.model_key, result, args.folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Check one model; returns the exit code: 1 if it did not pass."""
    made = parser("calibrate kvshare", __doc__)
    add_flags(made)
    made.add_argument("--documents", type=count, help="documents of a donor (default: 11, or as many as the context holds)")
    add(made, ("prompts", 24, "prompts per kind of donors"))
    add(
        made,
        ("kl", 0.05, "most mean KL that the default policy may have"),
        ("kl-isolated", 0.1, "the same with donors compiled alone"),
        ("top1", 0.9, "least top-1 agreement of it"),
        kind=float,
    )
    made.add_argument("--folder", type=Path, help="store the result here instead of the cache folder")
    args = made.parse_args(argv)
    if not args.kl >= 0:
        raise ConfigError(f"--kl is {args.kl}; allowed: 0 or more")
    if not 0 <= args.top1 <= 1:
        raise ConfigError(f"--top1 is {args.top1}; allowed: 0 to 1")
    console.print(f"loading {args.model} ...")
    path = calibrate(engine(args), args)
    console.print("nothing was stored: this model is served exactly" if path is None else f"stored in {path}")
    return FAILED if path is None else 0
