"""Where kvloom keeps what it made or fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KVLOOM_CACHE, or the platform's cache folder for kvloom."""
    if own := os.environ.get("KVLOOM_CACHE"):
        return Path(own).expanduser()
    import platformdirs  # `make gpu-check` may have to do without it, and says where

    return Path(platformdirs.user_cache_dir("kvloom"))
