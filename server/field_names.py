"""Errors in a chat's fields, told to those who sent something else: other endpoints of conversations make a chat of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvloom.engine.errors import InvalidRequestError

Names = Mapping[str, str]
"""Fields of a chat -> what they are called by who sent something else."""


def renamed(error: Exception, names: Names) -> Exception:
    """The error in these terms. A place in the messages is none in what was sent: of that the whole is blamed."""
    if not isinstance(error, InvalidRequestError):
        return error
    given, message = error.param or "", str(error)
    field, *path = re.split(r"(?=[.\[])", given, maxsplit=1)
    own = given
    if field in names:
        own = names[field] + ("" if field == "messages" else "".join(path).replace(".json_schema", "", 1))
        here, there = (given, own) if given in message else (field, names[field])
        message = re.sub(rf"\b{re.escape(here)}(?!\w)", lambda _: there, message, count=1)
    if "response_format" in names:
        message = re.sub(r"\bresponse_format\b", names["response_format"], message)
    return type(error)(message, own or None)


@contextmanager
def called(names: Names) -> Iterator[None]:
    """Raises errors in these terms."""
    try:
        yield
    except InvalidRequestError as error:
        raise renamed(error, names) from error
