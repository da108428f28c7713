"""A short run of the fuzzer over engines of all settings; `make fuzz` runs it for as long as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.loadtest.fuzz.engines import SETTINGS, engine, stage
from kvloom.loadtest.fuzz.fuzzer import Fuzzer, FuzzError

SEED = 20_261_128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = tmp_path_factory.mktemp("fuzz")
    with stage(found):
        yield found


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_no_request_harms_the_engine(folder: Path, number: int) -> None:
    fuzzer = Fuzzer(engine(folder, number), SEED + number)
    for _ in range(2):
        fuzzer.batch()
    tally = fuzzer.tally
    assert tally.requests == 256 and sum(tally.ends.values()) == 256
    assert tally.ends["length"] > 10 and tally.ends["refused"] > 5 and "error" not in tally.ends


def test_what_the_engine_isolates_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that ends one request alone is a failure all the same."""
    fuzzer = Fuzzer(engine(folder, 0), SEED)
    real = fuzzer.llm.core.decoding._next

    def fail(*args: object) -> object:
        if fuzzer.tally.requests > 30:
            raise ZeroDivisionError
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fuzzer.llm.core.decoding, "_next", fail)
    with pytest.raises(FuzzError):
        fuzzer.batch()
