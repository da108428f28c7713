"""Where kvloom keeps what it made or fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$KVLOOM_CACHE, or kvloom's folder in the user's cache folder, as the XDG specification finds that."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("KVLOOM_CACHE") or f"{users}/kvloom").expanduser()
