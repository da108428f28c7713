"""A few hundred cases of the fuzzer of chats; `make fuzz` runs more."""

from kvloom.loadtest.fuzz.chats import attempt, run


def test_random_chats_with_tools():
    ends = run(attempt, 120, seed=1)
    assert {"rendered", "refused by the template", "refused by the schema"} <= ends.keys()
