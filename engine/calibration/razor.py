"""RazorAttention's calibration: how much of an induction or echo head every KV head is, and the head classes made of it.

RazorAttention (arXiv 2407.15891) keeps the whole sequence for *retrieval* heads alone: the best 14% of all heads by induction
score together with the best few by echo score. Which those are is a property of a model, measured once (`razor_scores`).

A share of n heads is max(1, ceil(share * n)) heads: rounding to the nearest would leave small models without echo heads. Equal
scores go to the lower layer, then the lower head, so a share never takes more heads than it says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.engine.calibration import store
from kvloom.engine.errors import ModelError

METHOD = "razor"
INDUCTION_SHARE = 0.14
"""Of all KV heads, by induction score: the paper's."""
ECHO_SHARE = 0.04
"""Of all KV heads, by echo score. The paper's 0.01 was found on models with as many KV heads as query heads; under GQA, where
it is a head or two, three more heads made the difference between finding a fact and not: docs/razor-attention.md."""

Head = tuple[int, int]
"""Layer, KV head."""
Scores = tuple[tuple[float, ...], ...]
"""[layers][kv_heads]"""


@dataclass(frozen=True, slots=True)
class HeadClasses:
    """Which KV heads keep everything; the others are local. Raises ValueError if there are no such heads."""

    retrieval: tuple[tuple[int, ...], ...]
    """[layers]: the KV heads that keep everything, ascending."""
    kv_heads: int

    def __post_init__(self) -> None:
        for layer, heads in enumerate(self.retrieval):
            if list(heads) != sorted(set(heads)) or not set(heads) <= set(range(self.kv_heads)):
                raise ValueError(
                    f"the retrieval heads of layer {layer} are {list(heads)}; allowed: ascending, 0 to {self.kv_heads - 1}"
                )

    @classmethod
    def of(cls, heads: Iterable[Head], layers: int, kv_heads: int) -> HeadClasses:
        """From (layer, head) pairs in any order."""
        found = set(heads)
        if strange := {layer for layer, _ in found} - set(range(layers)):
            raise ValueError(f"there are retrieval heads in layers {sorted(strange)}; allowed: 0 to {layers - 1}")
        return cls(tuple(tuple(sorted(head for at, head in found if at == layer)) for layer in range(layers)), kv_heads)

    @classmethod
    def random(cls, layers: int, kv_heads: int, count: int, seed: int) -> HeadClasses:
        """So many retrieval heads anywhere: what calibrated ones are compared with."""
        if not 0 <= count <= layers * kv_heads:
            raise ValueError(f"{count} retrieval heads are wanted; allowed: 0 to {layers * kv_heads}")
        drawn = random.Random(seed).sample(range(layers * kv_heads), count)
        return cls.of((divmod(i, kv_heads) for i in drawn), layers, kv_heads)

    @classmethod
    def all(cls, layers: int, kv_heads: int) -> HeadClasses:
        """Every head a retrieval head: dense attention."""
        return cls((tuple(range(kv_heads)),) * layers, kv_heads)

    @property
    def layers(self) -> int:
        return len(self.retrieval)

    @property
    def count(self) -> int:
        """Retrieval heads in all."""
        return sum(map(len, self.retrieval))

    @property
    def share(self) -> float:
        """Retrieval heads of all heads, 0 to 1."""
        return self.count / (self.layers * self.kv_heads)

    @property
    def heads(self) -> tuple[Head, ...]:
        """All retrieval heads, ascending."""
        return tuple((layer, head) for layer, heads in enumerate(self.retrieval) for head in heads)

    def local(self, layer: int) -> tuple[int, ...]:
        """The heads of a layer that keep sinks and a window alone, ascending."""
        return tuple(head for head in range(self.kv_heads) if head not in self.retrieval[layer])


def best_heads(scores: Sequence[Sequence[float]], share: float) -> list[Head]:
    """The best max(1, ceil(share * all)) heads, best first; ties to the lower (layer, head). scores: [layers][kv_heads].

    Raises ValueError if share is not in 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of heads is {share}; allowed: 0 to 1")
    ranked = sorted((-score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    count = max(1, math.ceil(round(share * len(ranked), 9)))  # 0.14 * 50 is a little more than 7 in floating point
    return [(layer, head) for _, layer, head in ranked[:count]]


def retrieval_heads(
    induction: Sequence[Sequence[float]],
    echo: Sequence[Sequence[float]],
    induction_share: float = INDUCTION_SHARE,
    echo_share: float = ECHO_SHARE,
) -> HeadClasses:
    """The best heads of both rankings together. Raises ValueError if a share is not in 0 to 1."""
    chosen = {*best_heads(induction, induction_share), *best_heads(echo, echo_share)}
    return HeadClasses.of(chosen, len(induction), len(induction[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RazorCalibration:
    """What was found for one model."""

    model_key: str
    model: str
    """Its name when it was calibrated."""
    induction: Scores
    """[layers][kv_heads], 0 to 1: mean attention to what followed the earlier copies of a token, best query head."""
    echo: Scores
    """[layers][kv_heads], 0 to 1: mean attention to the earlier copies themselves, best query head."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was measured with: tokens, repeats, seeds and their overlap, date."""

    def __post_init__(self) -> None:
        widths = {len(row) for row in (*self.induction, *self.echo)}
        if len(self.induction) != len(self.echo) or len(widths) != 1 or not widths.isdisjoint({0}):
            raise ValueError("induction and echo scores of the same layers and heads")

    @property
    def layers(self) -> int:
        return len(self.induction)

    @property
    def kv_heads(self) -> int:
        return len(self.induction[0])

    def classes(
        self, induction_share: float = INDUCTION_SHARE, echo_share: float = ECHO_SHARE, *, random_seed: int | None = None
    ) -> HeadClasses:
        """The best of both rankings together, at least one of each. Raises ValueError if a share is not in 0 to 1.

        random_seed: as many heads drawn at random instead, to compare with.
        """
        found = retrieval_heads(self.induction, self.echo, induction_share, echo_share)
        return found if random_seed is None else HeadClasses.random(self.layers, self.kv_heads, found.count, random_seed)


def find_razor(model_key: str) -> RazorCalibration | None:
    """The calibration of a model, this machine's own before the shipped one. Raises ModelError if a file is damaged."""
    content = store.read(METHOD, model_key)
    if content is None:
        return None
    try:
        return RazorCalibration(
            model_key=model_key,
            model=str(content["model"]),
            induction=_scores(content["induction"]),
            echo=_scores(content["echo"]),
            settings=dict(content["settings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the calibration of {model_key} lacks {error}; calibrate again") from None


def save_razor(calibration: RazorCalibration, folder: Path | None = None) -> Path:
    """Store it where `find_razor` looks first, or in `folder`. Returns the file."""
    content = {
        "model": calibration.model,
        "settings": dict(calibration.settings),
        "induction": [list(row) for row in calibration.induction],
        "echo": [list(row) for row in calibration.echo],
    }
    return store.write(METHOD, calibration.model_key, content, folder)


def _scores(rows: Sequence[Sequence[float]]) -> Scores:
    return tuple(tuple(map(float, row)) for row in rows)
