"""`kvloom models list` and `kvloom models pull`."""

from __future__ import annotations

import time

from kvloom.engine.settings.folders import cache_folder
from kvloom.engine.startup import catalog
from kvloom.server.console import LoadingBars


def list_models() -> int:
    """Print the built-in models and whether each is on this machine, and the packed weights that are kept."""
    from kvloom.engine.model.packed_cache import list_packed

    cached = {model.name for model in catalog.list_cached()}
    print(f"cache folder: {cache_folder()}")
    for model in catalog.builtin_models():
        state = "in the cache" if model.name in cached else "not fetched yet"
        print(f"{model.name:<12} {model.size / 1e6:>7.0f} MB  {state:<16} {model.title} ({model.licence})")
    packed = list_packed(catalog.packed_folder())
    if packed:
        print(f"packed weights, for a quick start (may be deleted): {catalog.packed_folder()}")
    for file in packed:
        print(f"{file.size / 1e6:>7.0f} MB  last used {time.strftime('%Y-%m-%d', time.localtime(file.used))}  {file.name}")
    return 0


def pull_model(name: str) -> int:
    """Fetch a model and print where it is. Raises ModelNotFoundError or ModelError."""
    with LoadingBars() as progress:
        files = catalog.pull(name, progress)
    print(f"{name} is at {files.path}")
    return 0
