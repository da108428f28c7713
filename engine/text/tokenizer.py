"""Text to token ids and back, over the `tokenizers` library.

Owns what a token looks like as bytes. There is one way to decode, here and in `detokenizer`: a token is bytes, and text is
their concatenation read as UTF-8, with U+FFFD where the bytes are no UTF-8. For byte-level BPE this is what the `tokenizers`
library does itself; for SentencePiece vocabularies it differs only where a model emits broken UTF-8 (the library then replaces
the valid characters of the same run of byte tokens, too).

The library is imported once there is a vocabulary to read: an engine that is given token ids needs none.

Special tokens in text are recognised wherever they stand, as in vLLM and transformers: a chat is rendered by its template and
the whole text is encoded, so a user who writes `<|im_end|>` ends the turn. A server that must not allow this refuses such
text before it is rendered: `Tokenizer.special_in(text)` finds it.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.engine.errors import InvalidRequestError
from kvloom.engine.model.files import naming
from kvloom.engine.text.settings import TokenizerSettings
from kvloom.engine.text.spelling import Spelling, byte_alphabet, byte_level, most_bytes, spelling_of

if TYPE_CHECKING:
    import tokenizers

_NFC_SHRINKS = 4
"""Characters that NFC may join to one."""


class Tokenizer:
    """A vocabulary with its rules. Immutable after construction and safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        """Raises ModelError if tokens are spelled in a way that is not known (neither byte-level nor SentencePiece)."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id = settings.bos_id
        self.eos_ids = settings.eos_ids
        self.chat_template = settings.chat_template
        self.response_template = settings.response_template
        self.vocab_size: int = settings.vocab_size or backend.get_vocab_size()
        self._settings = settings
        self._spelling: Spelling = spelling_of(backend)
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """A Hugging Face model folder: tokenizer.json and, where present, its companions. Raises ModelError."""
        from kvloom.engine.text.load_folder import load_folder

        with naming(Path(path)):
            return cls(*load_folder(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: object = "this GGUF") -> Tokenizer:
        """The `tokenizer.*` keys of a GGUF file. where: named in errors and warnings, the file's path. Raises ModelError
        naming what is not supported."""
        from kvloom.engine.text.load_gguf import load_gguf

        with naming(where):
            return cls(*load_gguf(metadata, where))

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        made = copy.copy(self)
        made.chat_template = source
        return made

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens` adds what the model expects around a plain text (mostly bos); a text
        rendered from a chat template already holds it. Raises InvalidRequestError for lone surrogates (JSON can write them;
        they are no text)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, as `encode` gives them. Other threads run meanwhile: the library holds the interpreter
        for a single text, but not for a batch, be it of one."""
        settings = self._settings
        if settings.add_bos is None or not add_special_tokens:
            return self._encode(texts, add_special_tokens)
        begin = [self.bos_id] if settings.add_bos and self.bos_id is not None else []
        end = [self.eos_ids[0]] if settings.add_eos and self.eos_ids else []
        return [[*begin, *ids, *end] for ids in self._encode(texts, False)]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            raise InvalidRequestError("the text holds lone surrogates (half of a UTF-16 pair); send valid Unicode") from None
        return [encoding.ids for encoding in found]

    @cached_property
    def longest_token(self) -> int | None:
        """Most bytes of text that one token stands for, so that a text has at least bytes / longest_token of them; None where
        text can vanish: rules that rewrite it before, added tokens that swallow the spaces around them, unknown
        characters that become one token."""
        added = self.backend.get_added_tokens_decoder().values()
        vanishes = any(token.lstrip or token.rstrip for token in added) or '"Removed"' in _state(self.backend.pre_tokenizer)
        whole = all(self.backend.token_to_id(character) is not None for character in byte_alphabet())
        if self._spelling.to_bytes is not byte_level or vanishes or not whole:
            return None
        normalizer = json.loads(_state(self.backend.normalizer))
        if normalizer is not None and normalizer["type"] != "NFC":
            return None
        given = self._settings.most_bytes
        longest = most_bytes(self.backend.get_vocab(with_added_tokens=True)) if given is None else given
        longest = max([longest, *(len(token.content.encode()) for token in added)])
        return longest if normalizer is None else _NFC_SHRINKS * longest

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text cannot have less of: quick, and for most texts far too low."""
        longest = self.longest_token
        return 0 if longest is None else len(text) // longest  # a character is at least one byte

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, *, open_end: bool = False) -> str:
        """Text of token ids. Ids outside the vocabulary (padding of the embedding matrix) are no text. `open_end` leaves out a
        character that is not complete at the end, since more tokens follow."""
        skip = self._special if skip_special_tokens else {}
        raw = b"".join(self.token_bytes(i) for i in ids if i not in skip)
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final=not open_end)
        return text[1:] if self.strips_first_space and text.startswith(" ") else text

    @property
    def strips_first_space(self) -> bool:
        """SentencePiece vocabularies put a space before the first word; decoding from the start takes it away."""
        return self._spelling.strips_first_space

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes: possibly part of a character, empty outside the vocabulary."""
        found = self._bytes.get(token)
        if found is None:
            text = self.backend.id_to_token(token) if 0 <= token < self.vocab_size else None
            found = b"" if text is None else self._spelling.to_bytes(text)
            if text is not None:  # unknown ids are not kept: a caller could fill memory with them
                self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """A token's bytes as text, U+FFFD where they are part of a character. Special tokens show their name."""
        return self.token_bytes(token).decode("utf-8", errors="replace")

    def token_name(self, token: int) -> str:
        """What lists of tokens show: its text; bytes that are no text alone are spelled `bytes:\\xf0\\x9f`, as OpenAI does."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(self._special)

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves the token out by default."""
        return token in self._special

    def special_text(self, token: int | None) -> str:
        """The name of a special token, as a template writes it; empty for None."""
        return "" if token is None else str(self.backend.id_to_token(token) or "")

    def special_in(self, text: str) -> str | None:
        """A special token that the text would be encoded to, if it holds one."""
        return next((content for content in self._special.values() if content in text), None)


def _state(rules: Any) -> str:
    """A part of a tokenizer as JSON, without the vocabulary."""
    return "null" if rules is None else str(rules.__getstate__().decode())
