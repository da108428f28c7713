"""Settings from the environment: every flag of `kvloom serve` is also a variable, KVLOOM_ and its name in capitals.

An empty variable counts as not given. A variable under the prefix that is neither a setting nor one of `OTHERS` is an error, as
an unknown flag is: a mistyped one would do nothing, silently. What Kubernetes sets for Services whose names begin with kvloom
(`KVLOOM_PORT=tcp://10.0.0.1:8000`, `KVLOOM_WEB_SERVICE_HOST`) is none of ours and left alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import Option

PREFIX = "KVLOOM_"
CONFIG = PREFIX + "CONFIG"
"""Stands for --config."""
OTHERS = frozenset({CONFIG, PREFIX + "CACHE", PREFIX + "NATIVE", PREFIX + "TEST_DEVICE"})
"""Variables that are no settings of the server."""
_SERVICE_NAME = re.compile(r"KVLOOM_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def variable(option: Option) -> str:
    """The variable of a setting."""
    return PREFIX + option.name.upper()


def settings(environ: Mapping[str, str], options: Iterable[Option]) -> dict[str, Any]:
    """The given ones of these settings by name, as a YAML file would give them. Raises ConfigError for a truth value that is
    none."""
    found: dict[str, Any] = {}
    for option in options:
        name = variable(option)
        text = environ.get(name, "")
        if text and not _is_service(name, text):
            found[option.name] = _truth(name, text) if option.type is bool else text
    return found


def check_names(environ: Mapping[str, str], options: Iterable[Option]) -> None:
    """Raises ConfigError if a variable under the prefix is unknown; names the nearest that is known."""
    known = {variable(option) for option in options} | OTHERS
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known and not _is_service(name, environ[name]):
            near = difflib.get_close_matches(name.removeprefix(PREFIX), [one.removeprefix(PREFIX) for one in known], 1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else "kvloom serve --help lists those there are"
            raise ConfigError(f"unknown environment variable {name}: {hint}")


def _is_service(name: str, text: str) -> bool:
    """Whether Kubernetes made it, for containers in reach of a Service."""
    return bool(_SERVICE_NAME.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(text)))


def _truth(name: str, text: str) -> bool:
    try:
        return _TRUTH[text.strip().lower()]
    except KeyError:
        raise ConfigError(f"{name} is {text!r}; allowed: {', '.join(_TRUTH)}") from None
