"""The engine: requests, cache, scheduler, model. Imports nothing of the server.

Public names load on first use, so that `import kvloom.engine` does not import torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom.engine.client import EngineClient, EngineStats
    from kvloom.engine.config import EngineConfig
    from kvloom.engine.llm import LLM, Completion
    from kvloom.engine.requests.request import KVOptions, RequestOutput
    from kvloom.engine.requests.sampling import SamplingParams
    from kvloom.engine.thread.client import ThreadEngineClient

_HOMES = {
    "LLM": "llm",
    "Completion": "llm",
    "EngineClient": "client",
    "EngineConfig": "config",
    "EngineStats": "requests.stats",
    "KVOptions": "requests.request",
    "RequestOutput": "requests.request",
    "SamplingParams": "requests.request",
    "ThreadEngineClient": "thread.client",
}

__all__ = [
    "LLM",
    "Completion",
    "EngineClient",
    "EngineConfig",
    "EngineStats",
    "KVOptions",
    "RequestOutput",
    "SamplingParams",
    "ThreadEngineClient",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"kvloom.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'kvloom.engine' has no attribute {name!r}")
