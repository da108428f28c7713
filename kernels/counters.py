"""What back ends count of what they do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What a back end did since it was made; read by metrics and by tests that hold it to the formulas.

    rows, positions: query rows without padding, and key positions visible to them summed over KV heads
    kv_bytes: bytes of K and V that the operation needs to read at least once per row and KV head (not measured traffic:
    the g query heads of a KV head share one read; consecutive rows of a prefill tile are counted once per tile)
    score_bytes: bytes of K read by `score`
    list_kv_bytes: the part of kv_bytes that lists name; the rest lies in tails
    """

    rows: int = 0
    positions: int = 0
    kv_bytes: int = 0
    score_bytes: int = 0
    list_kv_bytes: int = 0
