"""Text for quality measurements; `corpus` owns it."""

from __future__ import annotations

from kvloom.loadtest.workloads.corpus import reference_text, windows

__all__ = ["reference_text", "windows"]
