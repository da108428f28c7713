"""Text for quality measurements; `corpus` owns it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality.decoding import Passage
from kvloom.loadtest.study.runner import console
from kvloom.loadtest.workloads.corpus import reference_text, sections, windows

__all__ = ["reference_text", "windows"]


def read(file: Path) -> str:
    """A text file. Raises ConfigError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def real_text(llm: LLM, file: Path | None) -> list[int]:
    """Tokens of a file, or of Python's reference with every paragraph once. Raises ConfigError if it cannot be read."""
    text = "\n\n".join(section.text for section in sections()) if file is None else read(file)
    return llm.tokenizer.encode(text, add_special_tokens=False)


def passages(llm: LLM, text: list[int], context: int, forced: int, count: int) -> list[Passage]:
    """Windows of a text: `context` tokens of prompt and `forced` to follow. Raises ConfigError if they cannot be had."""
    longest = llm.core.limits.max_model_len
    if context + forced > longest:
        raise ConfigError(f"{context} tokens of context and {forced} to decode exceed the {longest} of {llm.model.name}")
    try:
        found = windows(text, context + forced, count)
    except ValueError as error:
        raise ConfigError(f"{error}; lower --windows or --context") from None
    return [Passage(tuple(window[:context]), tuple(window[context:])) for window in found]


def cut(passages: Sequence[Passage], forced: int) -> list[Passage]:
    """The same with fewer forced tokens."""
    return [Passage(passage.prompt, passage.forced[:forced]) for passage in passages]


def warn_of_room(llm: LLM, tokens: int) -> None:
    """Say if prompts will not stay in the cache between measurements."""
    have = llm.core.cache.capacity_tokens
    if tokens > have:
        console.print(
            f"[yellow]the KV cache holds {have:,} tokens, this run wants {tokens:,}: prompts will be computed again for every "
            "method; give more --kv-memory to save that time"
        )
