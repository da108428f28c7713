"""Settings of KVShare: what a request may choose, and what a server fixes.

Both are read from JSON objects; a field's docstring is its documentation. Defaults are what measured best (docs/kvshare.md);
`PAPER` is the published form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from kvloom.engine.bounds import MOST_TOKENS, bounded
from kvloom.engine.errors import ConfigError, InvalidRequestError
from kvloom.engine.selection.base import check_fields, read_fields
from kvloom.engine.settings.options import json_object

Policy = Literal["focus", "dhd", "query", "blend", "boundary", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
SCOPES = ("none", "tenant", "group", "public")
"""How far what a request leaves behind may go."""
GATE = "kvshare"
"""The calibration that says a model may be served with approximate reuse."""
RATIOS = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Ratios that the adaptive choice goes through."""


@dataclass(frozen=True, slots=True)
class RepairOptions:
    """What is recomputed of reused KV: `kv.kvshare` in a request, `kvshare_options` of a server for its default."""

    policy: Policy = "focus"
    """How reused tokens are ranked for recomputation: focus (deviation x root of the attention, all layers), dhd (deviation x
    attention, the paper), blend (deviation), query (attention, all layers), boundary (the first ones of every run), random (a
    control)."""
    ratio: float = bounded(0.15, 0, 1)
    """Share of reused tokens that is recomputed in the prompt pass, boundaries included, 0 to 1; 1 is exact."""
    adaptive: bool = False
    """Take the smallest of a row of ratios (0.1 to 1) that leaves at most 0.3 of the score uncovered, instead of `ratio`."""
    boundary: int = bounded(4, 0, 4096)
    """Of those, the first so many of every run come before any ranking: they stand next to another context than before."""
    tail: int = bounded(16, 1, 4096)
    """Tokens at the end of a prompt that are never reused."""
    refresh: int = bounded(0, 0, 64)
    """Reused tokens recomputed per decode step; 0 for none. The paper's code takes 3."""
    refresh_order: Literal["importance", "position", "runs", "sweep"] = "importance"
    """Which first: importance (their score at the prompt pass), position (the paper's code), runs (runs of 4 with the highest
    score), sweep (all tokens from the first approximate one on, in order: after it the request is exact)."""
    max_stale: float = bounded(0.9, 0, 1)
    """Share of a prompt that may stay as it was copied, 0 to 1; more is recomputed if it would be exceeded."""

    def __post_init__(self) -> None:
        check_fields(self, "kvshare")

    @property
    def scans(self) -> bool:
        """Whether all rows must go through the first layers to rank them."""
        return self.policy in ("focus", "dhd", "blend", "query") and (self.ratio < 1 or self.adaptive)


PAPER = RepairOptions(policy="dhd", boundary=0, refresh=3, refresh_order="position")
"""arXiv 2503.16525 as far as it is known."""


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """What a server fixes. `repair` is the default of requests."""

    repair: RepairOptions = field(default_factory=RepairOptions)
    check_layer: int = bounded(1, 1, 64)
    """Layers [0, check_layer] run on all rows before tokens are ranked; layer 0 alone would show no deviation."""
    probe: int = bounded(16, 1, 1024)
    """Rows whose attention counts: the last so many of the prompt, as far as no donor has them."""
    min_match: int = bounded(64, 32, 8192)
    """Shortest run that is reused; half of it where it touches another run of the same donor."""
    min_reusable: int = bounded(256, 1, MOST_TOKENS)
    """A prompt with less to reuse is computed plainly."""
    min_gain: float = bounded(0.1, -1, 1)
    """Share of the prompt's work that reuse must save; -1 to reuse where it costs time, too."""
    reject_above: float = bounded(0.35, 0, 1000)
    """Mean deviation ||V' - V|| / ||V|| at the check layer above which a run is computed instead; 0 rejects everything."""
    refresh_budget: int = bounded(16, 0, 1024)
    """Rows per step, of all requests together, for `RepairOptions.refresh`."""
    stop_mass: float = bounded(0.1, 0, 1)
    """Refreshing ends when the tokens left hold less than this share of the score."""
    shadow_share: float = bounded(0.01, 0, 1)
    """Share of requests that reused KV which are computed again in full when the engine is idle, to measure what reuse cost."""
    shadow_kl: float = bounded(0.05, 0, 1000)
    """Approximate reuse is switched off when shadow checks show a mean KL above this,"""
    shadow_top1: float = bounded(0.9, 0, 1)
    """or agree on fewer than this share of likeliest tokens."""
    heal: bool = True
    """Compute prompts that reused KV again in full when the engine is idle, so that what they added can be reused, too."""
    verified: bool = False
    """Serve approximate reuse for a model that no check has passed (`kvloom calibrate kvshare MODEL`)."""

    def __post_init__(self) -> None:
        check_fields(self, "kvshare")

    @classmethod
    def read(cls, text: str | None) -> ShareOptions:
        """From `--kvshare-options`: fields of this class and of `RepairOptions` in one JSON object. Raises ConfigError."""
        found = json_object("kvshare_options", text, '{"ratio": 0.2}')
        own = {f.name for f in fields(cls)} - {"repair"}
        try:
            repair = read_repair({key: value for key, value in found.items() if key not in own})
            server: ShareOptions = read_fields(cls, "kvshare", {key: value for key, value in found.items() if key in own})
        except InvalidRequestError as error:
            raise ConfigError(str(error).replace("kv.kvshare.", "kvshare_options: ")) from None
        return replace(server, repair=repair)


def read_repair(values: Mapping[str, Any], default: RepairOptions | None = None) -> RepairOptions:
    """A request's own options over a default. Raises InvalidRequestError naming the key that is wrong."""
    base = {f.name: getattr(default, f.name) for f in fields(RepairOptions)} if default is not None else {}
    options: RepairOptions = read_fields(RepairOptions, "kvshare", {**base, **values})
    return options
