"""Where kvloom keeps what it made or fetched."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """$KVLOOM_CACHE, or the platform's cache folder for kvloom."""
    return Path(os.environ.get("KVLOOM_CACHE") or platformdirs.user_cache_dir("kvloom")).expanduser()
