"""Who reads the answers to a request: the checkpoint's own response template where there is one, else the table of formats."""

from __future__ import annotations

from kvloom.server.answers.reader import AnswerReader, Expected
from kvloom.server.answers.template.reader import TemplateReader

Reader = AnswerReader | TemplateReader


def reader_of(expected: Expected) -> Reader:
    """A reader of one completion."""
    return AnswerReader(expected) if expected.template is None else TemplateReader(expected, expected.template)
