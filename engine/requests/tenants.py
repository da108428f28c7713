"""Who shares the engine, and with what claim: weights, quotas, groups, read from a YAML file.

    tenants:
      acme:
        weight: 2               twice the share of a tenant of weight 1 while both wait, and of the cache under pressure
        cache_bytes: 512MiB     most memory of findable prefixes
        segment_bytes: 64MiB    the same for segments of approximate reuse
        group: partners         whom it may share segments with, if a request says so
        publishes: true         whether its requests may leave segments for everybody
        api_keys: [first-key]   the HTTP side: who sends one of these keys is this tenant
    default:                    of every tenant that is not listed
      weight: 1

A tenant that is not listed is not refused: it gets `default`. What cannot be understood is a ConfigError that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvloom.engine.errors import ConfigError
from kvloom.engine.settings.options import parse_bytes

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
NAME_RULE = "1 to 64 letters, digits, dots, underscores and dashes"
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """What one tenant may claim."""

    name: str
    group: str = ""
    """Tenants of the same group may share what is shared with `group`; '' is no group."""
    weight: float = 1.0
    """Its share of work and of cached blocks, relative to other tenants; 0.01 to 100."""
    cache_bytes: int | None = None
    """Most bytes of prefixes that can be found; None for no bound."""
    segment_bytes: int | None = None
    """Most bytes of segments for approximate reuse; None for no bound."""
    publishes: bool = False
    """Whether its requests may share with `public`."""

    def divided(self, engines: int) -> Tenant:
        """Its claim on each of several engines."""
        parts = [None if whole is None else whole // engines for whole in (self.cache_bytes, self.segment_bytes)]
        return replace(self, cache_bytes=parts[0], segment_bytes=parts[1])


@dataclass(frozen=True, slots=True)
class Tenants:
    """The tenants that are known by name, and what all others get."""

    known: Mapping[str, Tenant] = field(default_factory=dict)
    default: Tenant = Tenant("")
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """API key -> name of its tenant."""

    def get(self, name: str) -> Tenant:
        """The tenant of that name; with the default's settings if it is not known."""
        found = self.known.get(name)
        return replace(self.default, name=name) if found is None else found

    def divided(self, engines: int) -> Tenants:
        """The same for each of several engines, over which quotas are spread."""
        return replace(self, known={name: one.divided(engines) for name, one in self.known.items()},
                       default=self.default.divided(engines))  # fmt: skip

    @classmethod
    def read(cls, file: str | None) -> Tenants:
        """The tenants of a YAML file, or none. Raises ConfigError naming what is wrong."""
        return cls() if file is None else cls.parse(_load(file), f"tenants file {file}")

    @classmethod
    def parse(cls, content: object, where: str = "tenants") -> Tenants:
        """The same from what the file holds. Raises ConfigError."""
        top = _mapping(content, where)
        _known(top, ("tenants", "default"), where)
        known: dict[str, Tenant] = {}
        keys: dict[str, str] = {}
        for name, settings in _mapping(top.get("tenants"), f"{where}: tenants").items():
            if not isinstance(name, str) or not NAME.match(name):
                raise ConfigError(f"{where}: a tenant is named {name!r}; allowed: {NAME_RULE} (quote a number)")
            here = f"{where}: tenant {name}"
            values = dict(_mapping(settings, here))
            for key in _keys(values.pop("api_keys", None), here):
                if key in keys:
                    raise ConfigError(
                        f"{here}: one of its api_keys is given twice, first to tenant {keys[key]}; give each once"
                    )
                keys[key] = name
            known[name] = _tenant(name, values, here)
        default = _tenant("", _mapping(top.get("default"), f"{where}: default"), f"{where}: default")
        return cls(known, default, keys)


def _load(file: str) -> object:
    import yaml

    from kvloom.engine.settings import strict_yaml

    try:
        return strict_yaml.load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tenants file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"tenants file {file} is not YAML{strict_yaml.told(error)}") from None


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: holds {type(value).__name__}; write names with their settings, one per line")
    return value


def _known(settings: Mapping[Any, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in settings:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(allowed)}")


def _keys(value: object, where: str) -> list[str]:
    given = [] if value is None else value
    if not isinstance(given, list) or not all(
        isinstance(key, str) and key and key.isascii() and key.isprintable() and key == key.strip() for key in given
    ):
        raise ConfigError(f"{where}: api_keys must be a list of texts of printable ASCII (quote numbers)")
    return given


def _tenant(name: str, settings: Mapping[Any, Any], where: str) -> Tenant:
    _known(settings, (*_READERS, *(() if not name else ("api_keys",))), where)
    return Tenant(name, **{key: _READERS[key](value, f"{where}: {key}") for key, value in settings.items()})


def _weight(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}; allowed: a number from {LEAST_WEIGHT} to {MOST_WEIGHT:g}")
    if not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise ConfigError(f"{where} is {value}; allowed: {LEAST_WEIGHT} to {MOST_WEIGHT:g}")
    return float(value)


def _bytes(value: object, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{where} is {value!r}; write for instance 512MiB or a number of bytes")
    try:
        size = parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if size < 0:
        raise ConfigError(f"{where} is {size}; allowed: 0 or more bytes")
    return size


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}; allowed: true or false")
    return value


def _group(value: object, where: str) -> str:
    if not isinstance(value, str) or not (value == "" or NAME.match(value)):
        raise ConfigError(f"{where} is {value!r}; allowed: {NAME_RULE}, or '' for none")
    return value


_READERS: dict[str, Any] = {
    "group": _group,
    "weight": _weight,
    "cache_bytes": _bytes,
    "segment_bytes": _bytes,
    "publishes": _flag,
}
