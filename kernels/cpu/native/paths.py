"""Which loop runs: by the library, which follows from the processor (variants.py), and by the rows of a call.

The crossovers of linear layers are here and nowhere else: every call takes them along. No result depends on them, and nothing
is timed at start. `kvloom bench paths` times each loop on the machine it runs on, and says whether these numbers fit it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NEVER = 2**31 - 1
"""Rows that no call has."""
ONE_PANEL, STORED, UNPACKED, TILES = "one panel at a time", "stored panels", "unpacked panels", "AMX tiles"
"""Loops of linear layers."""
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

    def loop(self, rows: int) -> str:
        """The loop that so many rows take."""
        if rows >= self.tiles:
            return TILES
        return ONE_PANEL if rows <= self.one_panel else STORED if rows <= self.stored else UNPACKED

    def only(self, loop: str, most: int) -> Paths:
        """With one loop for any number of rows, as far as it takes them: stored panels meet `most` at once, or fewer."""
        bounds = {ONE_PANEL: (NEVER, most, NEVER), STORED: (0, most, NEVER), UNPACKED: (0, 0, NEVER), TILES: (0, 0, 1)}
        one_panel, stored, tiles = bounds[loop]
        return replace(self, one_panel=one_panel, stored=stored, tiles=tiles)

    def __str__(self) -> str:
        """As "linear layers: VNNI, 1-2 rows one panel at a time, 3-8 stored panels, from 9 unpacked panels; attention ..."."""
        parts, first = [self.products], 1
        for loop, last in ((ONE_PANEL, self.one_panel), (STORED, self.stored)):
            if last >= first:
                parts.append(f"{first}-{last} rows {loop}")
                first = last + 1
        if first > 1:
            parts.append(f"from {first} {UNPACKED}")
        if self.tiles != NEVER:
            parts.append(f"from {self.tiles} {TILES}")
        return f"linear layers: {', '.join(parts)}; attention over bf16: {self.attention}"


GENERIC = Paths("plain C++")
"""Of a library without any processor's instructions, and of NEON's, whose loops the compiler makes of it."""
