"""What a start needs of a model's files and can have without torch: where they are, a GGUF's header, the tokenizer.

Found on threads of their own, so that it happens while torch is imported and weights are loaded. A GGUF's header is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvloom.engine.client import ModelInfo
from kvloom.engine.errors import ConfigError, ModelError
from kvloom.engine.model.files import naming, shown
from kvloom.engine.model.gguf_file import GGUFFile
from kvloom.engine.startup.aside import aside
from kvloom.engine.startup.catalog import ModelFiles, resolve
from kvloom.engine.text import Tokenizer, check_vocabulary
from kvloom.engine.text.chat_template import ChatTemplate

MAX_TEMPLATE = 1 << 20
"""Characters of a chat template: the longest known has a fiftieth of that."""


class _Found(NamedTuple):
    files: ModelFiles
    gguf: GGUFFile | None


class Prepared:
    """A model's files, its header and its tokenizer. Each waits until it is there, and raises what reading it raised:
    ModelNotFoundError or ModelError."""

    def __init__(self, find: Callable[[], ModelFiles], chat_template: str | None = None) -> None:
        """Begins at once. find: tells where the model is, without fetching it first, since nothing could interrupt that;
        chat_template: Jinja source to use instead of the model's own."""
        self.chat_template = chat_template
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
        return load_tokenizer(files.path, gguf, self.chat_template)


def load_tokenizer(path: Path, gguf: GGUFFile | None = None, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or .gguf file; gguf: the file, if it is open already; chat_template: instead of the
    model's own. Raises ModelError."""
    found = Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf((gguf or GGUFFile(path)).metadata, path)
    return found if chat_template is None else found.with_chat_template(chat_template)


def read_template(given: str | None) -> str | None:
    """The setting `chat_template`: a file's text, or the template itself where it looks like one. Raises ConfigError for what
    cannot be read, or is no valid Jinja."""
    if given is None:
        return None
    source = given
    if not any(character in given for character in "{}\n"):
        try:
            with Path(given).expanduser().open(encoding="utf-8") as file:
                source = file.read(MAX_TEMPLATE + 1)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise ConfigError(
                f"chat_template is {shown(given)}, which cannot be read: {reason}; give a file with a Jinja template, or the "
                "template itself"
            ) from None
    if len(source) > MAX_TEMPLATE:
        raise ConfigError(f"chat_template has more than {MAX_TEMPLATE} characters; give the Jinja template of a chat model")
    try:
        ChatTemplate(source)
    except ModelError as error:
        raise ConfigError(f"chat_template {shown(given)}: {error}") from None
    return source


def tokenizer_of(model: ModelInfo) -> Tokenizer:
    """The tokenizer of a model that is served elsewhere, from its files on this machine, which are fetched if need be.

    Raises ModelNotFoundError, or ModelError also if the files here are those of another vocabulary.
    """
    path = resolve(model.source).path
    tokenizer = load_tokenizer(path, chat_template=model.chat_template)
    check_vocabulary(tokenizer, model.vocab_size, path)
    return tokenizer


def _open(files: ModelFiles) -> _Found:
    with naming(files.path):
        return _Found(files, GGUFFile(files.path) if files.kind == "gguf" else None)
