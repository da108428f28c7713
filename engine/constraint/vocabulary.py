"""A model's vocabulary as llguidance reads it: every token's bytes, which tokens are special, which ones end a text.

Made once per engine, from the tokenizer that is there anyway: about 0.2 s for 49,000 tokens, with the interpreter's lock held.
llguidance is imported here and where grammars are written, not before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kvloom.engine.text import Tokenizer

if TYPE_CHECKING:
    import llguidance


def vocabulary(tokenizer: Tokenizer, size: int, ends: Collection[int]) -> llguidance.LLTokenizer:
    """size: of the model's vocabulary; ids without text are never allowed. ends: tokens that end a text, at least one."""
    import llguidance

    wrapped = llguidance.TokenizerWrapper(_Tokens(tokenizer, size, min(ends)))
    return llguidance.LLTokenizer(wrapped, eos_token=sorted(ends))


class _Tokens:
    """What `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._single = {raw[0]: token for token, raw in enumerate(self.tokens) if len(raw) == 1 and token not in self._special}

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that a grammar leaves no choice but to write: those the model knows it by, whose bytes are exactly
        the text's; else a token per byte. Special tokens are not made of text that looks like them."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._encoded(raw)
        if self._special.isdisjoint(ids) and b"".join(map(self._tokenizer.token_bytes, ids)) == raw:
            return ids
        return [self._single[byte] for byte in raw] if all(byte in self._single for byte in raw) else []

    def _encoded(self, raw: bytes) -> list[int]:
        try:
            return self._tokenizer.encode(raw.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return []
