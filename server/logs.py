"""The log: lines for people, or JSON for machines, one object a line. Everything that any library logs goes the same way.

    {"time": "2026-11-29T12:00:00.123Z", "level": "info", "logger": "kvloom.access", "message": "...", "prompt_tokens": 12, ...}

What a message is made of stands beside it under names of its own, where whoever logs gives it: `extra=fields(status=400)`.
Nothing in it is a prompt, an answer or a key.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

LogFormat = Literal["text", "json"]
_TEXT = "%(asctime)s %(levelname)s %(message)s"
_QUIET = ("uvicorn.error", "uvicorn.access", "asyncio")
"""Loggers of which only warnings are worth a line."""


def fields(**named: Any) -> dict[str, Mapping[str, Any]]:
    """For `extra` of a logging call: what stands beside the message in JSON. None is left out."""
    return {"fields": {name: value for name, value in named.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def set_up(level: str, form: LogFormat) -> None:
    """Log to stderr from now on, instead of whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(form == "json")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
