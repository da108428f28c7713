"""`kvloom calibrate`: fitting a method to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_held(made: Any) -> None:
    """Flags of how a model is held while it is calibrated, and where the result goes."""
    made.add_argument("--weights", default="auto", help="how the model's weights are held meanwhile")
    made.add_argument("--dtype", default="bf16", help="compute and KV type meanwhile")
    made.add_argument("--folder", type=Path, help="store the result here instead of the cache folder")
