"""What a tokenizer needs to know beside its vocabulary; the loaders make it, `Tokenizer` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """What a tokenizer needs to know beside its vocabulary."""

    bos_id: int | None = None
    """Beginning of sequence."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a generation; the tokenizer's own first."""
    add_bos: bool | None = None
    """Whether `encode` puts bos in front; None leaves it to the tokenizer's own post-processor."""
    add_eos: bool = False
    """Whether `encode` puts eos behind (only with add_bos given)."""
    chat_template: str | None = None
    """Jinja source."""
    response_template: Any = None
    """What tokenizer_config.json says of how answers are read, as it says it; None if it says nothing."""
    vocab_size: int | None = None
    """Ids are below this; the default is what the vocabulary holds."""
    most_bytes: int | None = None
    """Bytes of the longest token where tokens are byte-level; the default is to look through the vocabulary."""


def unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    """The ids that are given, once each, in order."""
    return tuple(dict.fromkeys(i for i in ids if i is not None))
