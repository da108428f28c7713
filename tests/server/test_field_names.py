"""Errors in a chat's fields, in the words of who sent something else."""

import pytest

from kvloom.engine.errors import ContextLengthError, InvalidRequestError
from kvloom.server.field_names import called, renamed

NAMES = {"stop": "stop_sequences", "messages": "input", "response_format": "text.format"}


@pytest.mark.parametrize(
    ("message", "param", "told", "blamed"),
    [
        ("stop is 5; stop_token_ids is fine", "stop", "stop_sequences is 5; stop_token_ids is fine", "stop_sequences"),
        ("stop_token_ids has 300; stop is fine", "stop_token_ids", "stop_token_ids has 300; stop is fine", "stop_token_ids"),
        ("stop[2] is empty", "stop[2]", "stop_sequences[2] is empty", "stop_sequences[2]"),
        ("must be a text", "messages[3].content", "must be a text", "input"),
        ("response_format.json_schema.schema has NaN", "response_format.json_schema.schema", "text.format.schema has NaN",
         "text.format.schema"),
        ("regex beside response_format", "regex", "regex beside text.format", "regex"),
        ("too many", None, "too many", None),
    ],
)  # fmt: skip
def test_fields_have_their_own_names(message, param, told, blamed):
    error = renamed(InvalidRequestError(message, param), NAMES)
    assert (str(error), error.param) == (told, blamed)


def test_other_errors_and_classes_stay():
    other = RuntimeError("stop is 5")
    assert renamed(other, NAMES) is other
    with pytest.raises(ContextLengthError, match="stop_sequences is long"), called(NAMES):
        raise ContextLengthError("stop is long", "stop")
