"""Real English text that every Python carries: the language reference in `pydoc_data.topics`."""

from __future__ import annotations

from pydoc_data import topics


def reference_text() -> str:
    """Some 700 kB of prose, tables and code, in the order of topic names."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` tokens, spread evenly over the text. Raises ValueError if it is too short."""
    if len(tokens) < length * count:
        raise ValueError(f"{count} windows of {length} tokens need {length * count} tokens; the text has {len(tokens)}")
    stride = len(tokens) // count
    return [tokens[i * stride : i * stride + length] for i in range(count)]
