"""Figures of approximate reuse from samples, and what settings say of each other.

interval      mean over answer tokens, drawn prompt by prompt (tokens of one answer are alike)
paired        differences of two settings on the same prompts: far surer than the difference of two intervals
rank          Spearman's correlation (1904) of KL with the ratio: -1 if every token that is computed more helps
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvloom.loadtest.quality.reuse_runs import Sample, Times
from kvloom.loadtest.study.intervals import bootstrap, ratio, wilson
from kvloom.loadtest.study.results import Row

CONTROL = "random"
"""The policy that the others are compared with, prompt by prompt."""
LOWEST, TIED, APART = "lowest", "not told apart", "higher"
NAIVE, EVERYTHING = "naive", "everything"
"""What every policy is at a ratio of 0 and of 1."""


class Setting(NamedTuple):
    """One way to repair reused KV."""

    policy: str
    ratio: float
    boundary: int

    @property
    def options(self) -> dict[str, Any]:
        """Fields of `RepairOptions`."""
        policy = "boundary" if self.policy in (NAIVE, EVERYTHING) else self.policy
        return {"policy": policy, "ratio": self.ratio, "boundary": self.boundary}


def settings(policies: Sequence[str], ratios: Iterable[float], boundary: int) -> list[Setting]:
    """All of them; a ratio of 1 once, as it is the same for every policy."""
    ratios = sorted(set(ratios))
    found = [
        Setting(policy, one, boundary)
        for policy in policies
        if policy != NAIVE
        for one in ratios
        if 0 < one < 1
    ]  # fmt: skip
    first = [Setting(NAIVE, 0.0, 0)] if NAIVE in policies or 0 in ratios else []
    return first + found + ([Setting(EVERYTHING, 1.0, boundary)] if 1 in ratios else [])


def figures(samples: Sequence[Sample], times: Times | None = None) -> Row:
    """Means over prompts or answer tokens, with 95% intervals under `<name>_ci`."""
    blocks = [number for number, sample in enumerate(samples) for _ in sample.kl]
    kl, same = (np.array([value for sample in samples for value in getattr(sample, name)], float) for name in ("kl", "same"))
    right, exact = sum(sample.right for sample in samples), sum(sample.exact_right for sample in samples)
    found = sum(sample.reused + sample.recomputed for sample in samples)
    row: Row = {
        "n": len(kl),
        "recompute_share": sum(sample.recomputed for sample in samples) / found,
        "matched_share": found / sum(sample.tokens for sample in samples),
        "kl_mean": float(kl.mean()),
        "kl_mean_ci": bootstrap(kl, blocks),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(same.mean()),
        "top1_ci": bootstrap(same, blocks),
        "accuracy": right / len(samples),
        "accuracy_ci": wilson(right, len(samples)),
        "accuracy_exact": exact / len(samples),
        "kl_prompts": [round(float(np.mean(sample.kl)), 7) for sample in samples],
    }
    if times is not None and times.exact:
        dense, share = np.median(times.exact), np.median(times.approximate)
        row |= {
            "ttft_ms": float(share) * 1e3,
            "ttft_exact_ms": float(dense) * 1e3,
            "speed_up": float(dense / share),
            "speed_up_ci": ratio(times.exact, times.approximate),
        }
    return row


def relate(rows: Sequence[Row]) -> None:
    """Tell every row how its KL compares with naive reuse, with the control and with the lowest one at its ratio and donors."""
    naive = {row["donors"]: row for row in rows if row["policy"] == NAIVE}
    for _, group in _groups(rows, "donors", "ratio"):
        best = min(group, key=lambda row: row["kl_mean"])
        control = next((row for row in group if row["policy"] == CONTROL), None)
        for row in group:
            row["best"] = None
            _less(row, naive.get(row["donors"]), "kl_less_naive")
            _less(row, control, f"kl_less_{CONTROL}")
            if len(group) > 1 and _less(row, best, "kl_above_best"):
                bounds = row["kl_above_best_ci"]
                row["best"] = APART if bounds is not None and bounds[0] > 0 else TIED
            elif len(group) > 1 and row is best:
                row["best"] = LOWEST


def _less(row: Row, other: Row | None, name: str) -> bool:
    """Add the difference of KL to another row, prompt by prompt, with its interval; false if there is none to be had."""
    if other is None or other is row or len(other["kl_prompts"]) != len(row["kl_prompts"]):
        return False
    difference = np.subtract(row["kl_prompts"], other["kl_prompts"])
    row[name], row[f"{name}_ci"] = float(difference.mean()), bootstrap(difference)
    return True


class Trend(NamedTuple):
    """How KL goes with the ratio."""

    donors: str
    policy: str
    of_means: float
    of_prompts: float
    """Mean over prompts of each one's own."""


def trends(rows: Sequence[Row]) -> Iterator[Trend]:
    """Of every policy with three ratios or more, those of 0 and 1 included."""
    for (donors,), group in _groups(rows, "donors"):
        ends = [row for row in group if row["policy"] in (NAIVE, EVERYTHING)]
        for (policy,), own in _groups([row for row in group if row not in ends], "policy"):
            line = sorted([*own, *ends], key=lambda row: row["ratio"])
            if len(line) < 3:
                continue
            ratios = [row["ratio"] for row in line]
            each = [spearman(ratios, kl) for kl in zip(*(row["kl_prompts"] for row in line))]
            yield Trend(donors, policy, spearman(ratios, [row["kl_mean"] for row in line]), float(np.mean(each)))


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation of two rows of numbers, ties at their mean rank; 0 if one of them is constant."""
    x, y = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def _groups(rows: Iterable[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    def name(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    for found, group in itertools.groupby(sorted(rows, key=name), key=name):
        yield found, list(group)
