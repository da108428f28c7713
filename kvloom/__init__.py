"""kvloom: an LLM server whose subject is the KV cache.

The package itself holds the version and the public names; its sub-packages (`kvloom.engine`, `kvloom.kernels`,
`kvloom.server`, `kvloom.loadtest`) are the repository's top-level folders, linked here so that no generic name lands in
anyone's site-packages. Public names load on first use: `import kvloom` costs nothing.
"""

from typing import TYPE_CHECKING

from kvloom.version import __version__

if TYPE_CHECKING:
    from kvloom.engine import LLM, KVOptions, RequestOutput, SamplingParams

__all__ = ["LLM", "KVOptions", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from kvloom import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
