"""A tokenizer from a Hugging Face model folder.

Reads tokenizer.json (vocabulary and rules), tokenizer_config.json and special_tokens_map.json (names of special tokens,
add_bos_token, response_template), generation_config.json or config.json (further end tokens), and the chat template:
chat_template.jinja, else chat_template.json, else the one in tokenizer_config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import tokenizers

from kvloom.engine.errors import ModelError
from kvloom.engine.model.files import Fields, read_json_if_there, shown
from kvloom.engine.text.settings import TokenizerSettings, unique
from kvloom.engine.text.spelling import most_bytes

log = logging.getLogger("kvloom.model")

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_folder(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The backend with its special tokens marked, and the settings. Raises ModelError."""
    backend = _read_backend(folder / "tokenizer.json")
    config = read_json_if_there(folder / "special_tokens_map.json") | read_json_if_there(folder / "tokenizer_config.json")
    given = Fields(config, "tokenizer_config.json: ")
    names = {key: _content(config.get(key), key) for key in _NAMED}
    _mark_special(backend, [name for name in names.values() if name])
    for key in ("bos_token", "eos_token"):
        if names[key] and _token_id(backend, names[key]) is None:
            log.warning("%s: tokenizer_config.json names %r as %s, which tokenizer.json does not have", folder, names[key], key)
    bos_id, eos_id = (_token_id(backend, names[key]) for key in ("bos_token", "eos_token"))
    vocab = backend.get_vocab(with_added_tokens=True)
    explicit = "add_bos_token" in config or "add_eos_token" in config
    return backend, TokenizerSettings(
        bos_id=bos_id,
        eos_ids=unique([eos_id, *_end_tokens(folder)]),
        add_bos=given.flag("add_bos_token") if explicit else None,
        add_eos=given.flag("add_eos_token"),
        chat_template=_chat_template(folder, config),
        response_template=config.get("response_template"),
        vocab_size=max(vocab.values(), default=-1) + 1,
        most_bytes=most_bytes(vocab),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no tokenizer.json; save the fast tokenizer there (tokenizer.save_pretrained)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode("a")  # what is wrong with the rules shows here, not when a request comes
    except BaseException as error:  # the library raises bare Exception, and panics that are not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ModelError(f"{path} cannot be read ({error}); download the model again") from error
    return backend


def _content(token: Any, key: str) -> str | None:
    """A special token is a string or an object {"content": ...}, or there is none."""
    value = token.get("content") if isinstance(token, dict) else token
    if value is not None and not isinstance(value, str):
        raise ModelError(f"tokenizer_config.json: {key} is {shown(token)}; a string or an object with content is needed")
    return value


def _token_id(backend: tokenizers.Tokenizer, name: str | None) -> int | None:
    found: int | None = backend.token_to_id(name) if name else None
    return found


def _mark_special(backend: tokenizers.Tokenizer, names: list[str]) -> None:
    """Named tokens are special even if tokenizer.json forgets to say so. Unknown names are left: they would get new ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [name for name in names if name not in known and backend.token_to_id(name) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in missing])


def _end_tokens(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: an id or a list of ids."""
    for name in ("generation_config.json", "config.json"):
        found = Fields(read_json_if_there(folder / name), f"{name}: ").integers("eos_token_id")
        if found:
            return found
    return []


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{file} is not UTF-8 text ({error}); download the model again") from error
    template = read_json_if_there(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ModelError(f"chat_template is {shown(template)}; a string is needed, or a list of named ones")
    return template
