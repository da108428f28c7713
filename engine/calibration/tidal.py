"""TidalDecode's calibration: which layers select, and whose list each head reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.engine.calibration import store
from kvloom.engine.errors import ModelError

METHOD = "tidal_decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class TidalChoice:
    """One set of selection layers and what was measured of it."""

    layers: tuple[int, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    """As measured by the calibration: see `loadtest.calibrations.tidal_search.Figures`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TidalCalibration:
    """What was found for one model."""

    model_key: str
    model: str
    """Its name when it was calibrated."""
    choices: tuple[TidalChoice, ...]
    """One per number of selection layers, ascending."""
    default: int
    """Selection layers of the set that is used when nobody says otherwise."""
    head_map: tuple[tuple[tuple[int, ...], ...], ...]
    """[selection layer a][layer - a - 1][KV head]: the head of layer a whose choice suits it best."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was measured with: text, tokens, budget, date."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of selection layers that there are sets of."""
        return tuple(len(choice.layers) for choice in self.choices)

    def choice(self, selections: int | None) -> TidalChoice:
        """The set of so many selection layers (None: the default one). Raises KeyError if there is none."""
        wanted = self.default if selections is None else selections
        for choice in self.choices:
            if len(choice.layers) == wanted:
                return choice
        raise KeyError(wanted)

    def heads(self, anchor: int, layer: int) -> tuple[int, ...]:
        """Whose list of selection layer `anchor` each KV head of a later layer reads."""
        return self.head_map[anchor][layer - anchor - 1]


def find_tidal(model_key: str) -> TidalCalibration | None:
    """The calibration of a model, this machine's own before the shipped one. Raises ModelError if a file is damaged."""
    content = store.read(METHOD, model_key)
    if content is None:
        return None
    try:
        return TidalCalibration(
            model_key=model_key,
            model=str(content["model"]),
            choices=tuple(TidalChoice(layers=tuple(c["layers"]), figures=dict(c["figures"])) for c in content["choices"]),
            default=int(content["default"]),
            head_map=tuple(tuple(tuple(heads) for heads in anchor) for anchor in content["head_map"]),
            settings=dict(content["settings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the calibration of {model_key} lacks {error}; calibrate again") from None


def save_tidal(calibration: TidalCalibration, folder: Path | None = None) -> Path:
    """Store it where `find_tidal` looks first, or in `folder`. Returns the file."""
    content = {
        "model": calibration.model,
        "settings": dict(calibration.settings),
        "default": calibration.default,
        "choices": [{"layers": list(c.layers), "figures": dict(c.figures)} for c in calibration.choices],
        "head_map": [[list(heads) for heads in anchor] for anchor in calibration.head_map],
    }
    return store.write(METHOD, calibration.model_key, content, folder)
