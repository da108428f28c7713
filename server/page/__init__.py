"""The page at /: what is served here and how to ask it something. Loads nothing from anywhere."""

from __future__ import annotations

import html
import string
from functools import cache
from pathlib import Path

from kvloom.engine.client import EngineStats, ModelInfo
from kvloom.version import __version__


@cache
def _page() -> string.Template:
    return string.Template((Path(__file__).parent / "index.html").read_text(encoding="utf-8"))


def render(model: ModelInfo, stats: EngineStats, command: str) -> str:
    """The page as HTML. command: a shell command that asks the server something."""
    facts = {
        "version": __version__,
        "model": model.name,
        "kernels": f"{model.dtype}, weights {model.weights}, {model.backend} kernels on {model.device}",
        "context": f"{model.max_model_len:,}",
        "capacity": f"{stats.capacity_tokens:,}",
        "command": command,
    }
    return _page().substitute({name: html.escape(text) for name, text in facts.items()})
