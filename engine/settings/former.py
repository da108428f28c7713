"""Names of before, and what is said now: taken with a warning for one release, wherever options are read (JSON, command line,
YAML file, a request)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

_WINDOW = {"least": "min_window", "share": "window_divisor"}
OPTIONS: Mapping[str, Mapping[str, str]] = {"razor": _WINDOW, "razor_view": _WINDOW}
"""Whose options: name of before -> name."""
VALUES: Mapping[tuple[str, str], str] = {("backend", "numba"): "torch"}
"""(Setting, value of before) -> value."""

log = logging.getLogger("kvloom.engine")


def renamed(owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method by the names that they have now. One that is given under both names stays as it was, so that it
    is refused as unknown."""
    former = OPTIONS.get(owner, {})
    return {_warned(owner, name, former[name]) if name in former and former[name] not in values else name: value
            for name, value in values.items()}  # fmt: skip


def value_now(setting: str, value: Any) -> Any:
    """The value of a setting as it is called now."""
    now = VALUES.get((setting, value)) if isinstance(value, str) else None
    if now is None:
        return value
    log.warning("%s is %s, which there no longer is; %s takes its place: say that instead", setting, value, now)
    return now


@functools.cache
def _warned(owner: str, name: str, now: str) -> str:
    """The name of now; says so once."""
    log.warning("%s.%s is called %s now, and the old name will not be taken for long: say that instead", owner, name, now)
    return now
