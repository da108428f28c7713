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
PAIRS, TILED, WIDE = "bf16 pairs", "bf16 in AMX tiles", "fp32"


@dataclass(frozen=True, slots=True)
class Paths:
    """What one library does."""

    products: str
    """What linear layers are multiplied with: "VNNI", "AVX2", or "plain C++", one row at a time."""
    one_panel: int = 0
    """Rows up to which panels of weights are met one by one, each in the time that memory needs for it."""
    stored: int = 0
    """Rows up to which panels are multiplied as they are stored, some eight at a time; for more, codes are unpacked once."""
    stored_of: tuple[tuple[str, int], ...] = ()
    """The same of kinds that are cheaper or dearer to unpack than others."""
    tiles: int = NEVER
    """Rows from which they are multiplied in AMX tiles."""
    attention: str = WIDE
    """What attention over bf16 KV multiplies, whatever the rows: PAIRS as they lie in the cache, the same in tiles (TILED), or
    numbers widened to fp32 (WIDE)."""

    def most_stored(self, kind: str) -> int:
        """Rows up to which panels of a kind are multiplied as they are stored."""
        return dict(self.stored_of).get(kind, self.stored)

    def loop(self, rows: int, kind: str) -> str:
        """The loop that so many rows take."""
        if rows >= self.tiles:
            return TILES
        return ONE_PANEL if rows <= self.one_panel else STORED if rows <= self.most_stored(kind) else UNPACKED

    def within(self, tiles: int) -> Paths:
        """What is left of it in a library that was compiled with AMX tiles in linear layers (bit 0) and attention (bit 1)."""
        attention = PAIRS if self.attention == TILED and not tiles & 2 else self.attention
        return replace(self, tiles=self.tiles if tiles & 1 else NEVER, attention=attention)

    def only(self, loop: str) -> Paths:
        """With one loop for any number of rows."""
        bounds = {ONE_PANEL: (NEVER, NEVER, NEVER), STORED: (0, NEVER, NEVER), UNPACKED: (0, 0, NEVER), TILES: (0, 0, 1)}
        one_panel, stored, tiles = bounds[loop]
        return replace(self, one_panel=one_panel, stored=stored, stored_of=(), tiles=tiles)

    def __str__(self) -> str:
        """As "linear layers: VNNI, 1-4 rows one panel at a time, 5-15 stored panels, from 16 AMX tiles; attention ..."."""
        parts, first = [self.products], 1
        for loop, last in ((ONE_PANEL, self.one_panel), (STORED, min(self.stored, self.tiles - 1))):
            if last >= first:
                others = "".join(f", {kind} to {most}" for kind, most in self.stored_of if loop == STORED and most < self.tiles)
                parts.append(f"{first}-{last} rows {loop}{f' ({others[2:]})' if others else ''}")
                first = last + 1
        if 1 < first < self.tiles:
            parts.append(f"from {first} {UNPACKED}")
        if self.tiles != NEVER:
            parts.append(f"from {self.tiles} {TILES}")
        return f"linear layers: {', '.join(parts)}; attention over bf16: {self.attention}"


GENERIC = Paths("plain C++")
"""Of a library without any processor's instructions, and of NEON's, whose loops the compiler makes of it."""
