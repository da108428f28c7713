"""API keys from a file, as container platforms hand out secrets: one key a line.

Blank lines and lines that begin with # are left out. What is wrong is told without a word of what the file holds.
"""

from __future__ import annotations

import os
import stat

from kvloom.engine.errors import ConfigError

MOST_BYTES = 1 << 20


def read_keys(setting: str, path: str | None) -> tuple[str, ...]:
    """The keys in the file that a setting names; none for None.

    Raises ConfigError if it cannot be read, everybody may write to it, or it holds no key: a server without keys would serve
    everybody.
    """
    if path is None:
        return ()
    text = _text(setting, path)
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"{setting} {path} holds no key; write one a line")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{setting} {path} holds a key that no header can carry; allowed: printable ASCII without spaces")
    return keys


def _text(setting: str, path: str) -> str:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"{setting} {path} can be written by everybody on this machine; chmod o-w it")
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{setting} {path} is longer than {MOST_BYTES} bytes; write one key a line")
    return text
