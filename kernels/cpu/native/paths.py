"""Which loop runs: by the library, which follows from the processor (variants.py), and by the rows of a call.

The crossovers of linear layers are here and nowhere else: every call takes them along. No result depends on them, and nothing
is timed at start. `python -m kvloom.kernels measure` times each loop on the machine it runs on, and says whether these numbers
fit it.
"""

from __future__ import annotations

from dataclasses import dataclass

NEVER = 2**31 - 1
"""Rows that no call has."""
PAIRS, WIDE = "bf16 pairs", "fp32"


@dataclass(frozen=True, slots=True)
class Paths:
    """What one library does."""

    products: str
    """What linear layers are multiplied with: "VNNI", "AVX2", or "plain C++", one row at a time."""
    one_panel: int = 0
    """Rows up to which panels of weights are met one by one, each in the time that memory needs for it."""
    stored: int = 0
    """Rows up to which panels are multiplied as they are stored; for more, their codes are unpacked once."""
    tiles: int = NEVER
    """Rows from which they are multiplied in AMX tiles."""
    attention: str = WIDE
    """What attention over bf16 KV multiplies: PAIRS as they lie in the cache, or numbers widened to fp32 (WIDE)."""

    def __str__(self) -> str:
        """As "linear layers: VNNI, 1-2 rows one panel at a time, 3-8 stored panels, from 9 unpacked; attention: fp32"."""
        parts = [self.products]
        if self.one_panel:
            parts.append(f"1-{self.one_panel} rows one panel at a time")
        if self.stored > self.one_panel:
            parts.append(f"{self.one_panel + 1}-{self.stored} rows stored panels")
        if self.stored:
            parts.append(f"from {self.stored + 1} unpacked panels")
        if self.tiles != NEVER:
            parts.append(f"from {self.tiles} AMX tiles")
        return f"linear layers: {', '.join(parts)}; attention over bf16: {self.attention}"


GENERIC = Paths("plain C++")
"""Of a library without any processor's instructions, and of NEON's, whose loops the compiler makes of it."""
