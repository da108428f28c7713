"""A short round of the fuzzer of responses; `make fuzz` runs more."""

import asyncio

from kvloom.loadtest.fuzz.responses import fuzz, model


def test_random_responses(tmp_path):
    model(tmp_path)
    ends = asyncio.run(fuzz(tmp_path, 1, 150))
    assert {"200", "400", "404", "cut", "message", "reasoning"} <= ends.keys()
