"""What a start needs of a model's files and can have without torch: where they are, a GGUF's header, the tokenizer.

Found on threads of their own, so that it happens while torch is imported and weights are loaded. A GGUF's header is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvloom.engine.client import ModelInfo
from kvloom.engine.model.files import naming
from kvloom.engine.model.gguf_file import GGUFFile
from kvloom.engine.startup.aside import aside
from kvloom.engine.startup.catalog import ModelFiles, resolve
from kvloom.engine.text import Tokenizer, check_vocabulary


class _Found(NamedTuple):
    files: ModelFiles
    gguf: GGUFFile | None


class Prepared:
    """A model's files, its header and its tokenizer. Each waits until it is there, and raises what reading it raised:
    ModelNotFoundError or ModelError."""

    def __init__(self, find: Callable[[], ModelFiles]) -> None:
        """Begins at once. find: tells where the model is, without fetching it first, since nothing could interrupt that."""
        self._found = aside(lambda: _open(find()))
        self._tokenizer = aside(self._make_tokenizer)

    @property
    def files(self) -> ModelFiles:
        """Where the model is."""
        return self._found.result().files

    @property
    def gguf(self) -> GGUFFile | None:
        """The opened file, None for a folder."""
        return self._found.result().gguf

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self._tokenizer.result()

    def _make_tokenizer(self) -> Tokenizer:
        files, gguf = self._found.result()
        return load_tokenizer(files.path, gguf)


def load_tokenizer(path: Path, gguf: GGUFFile | None = None) -> Tokenizer:
    """The tokenizer of a model folder or .gguf file; gguf: the file, if it is open already. Raises ModelError."""
    if path.is_dir():
        return Tokenizer.from_folder(path)
    return Tokenizer.from_gguf((gguf or GGUFFile(path)).metadata, path)


def tokenizer_of(model: ModelInfo) -> Tokenizer:
    """The tokenizer of a model that is served elsewhere, from its files on this machine, which are fetched if need be.

    Raises ModelNotFoundError, or ModelError also if the files here are those of another vocabulary.
    """
    path = resolve(model.source).path
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, model.vocab_size, path)
    return tokenizer


def _open(files: ModelFiles) -> _Found:
    with naming(files.path):
        return _Found(files, GGUFFile(files.path) if files.kind == "gguf" else None)
