"""Engines for the fuzzer, over one model on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from kvloom.engine import LLM
from kvloom.engine.calibration import RazorCalibration, save_razor, store
from kvloom.loadtest.fuzz.model import KV_HEADS, LAYERS, write_model
from kvloom.loadtest.fuzz.settings import complete

TENANTS = "tenants:\n  alice: {group: g}\n  bob: {group: g, weight: 3}\n  press: {publishes: true}\ndefault: {group: g}\n"


@contextmanager
def stage(folder: Path) -> Iterator[None]:
    """The model in a folder, and a made-up calibration of its heads that is found only inside."""
    write_model(folder)
    (folder / "tenants.yaml").write_text(TENANTS)
    with patch.object(store, "own_folder", lambda: folder / "calibrations"):
        key = engine(folder, 0).core.runner.geometry.model_key
        scores = tuple(tuple(float(layer == head) for head in range(KV_HEADS)) for layer in range(LAYERS))
        save_razor(RazorCalibration(model_key=key, model="fuzz", induction=scores, echo=scores))
        yield


def engine(folder: Path, number: int) -> LLM:
    """One of them, by its settings. Call inside `stage`."""
    return LLM(str(folder), tenants=str(folder / "tenants.yaml"), **complete(number))
