"""Where calibrations are: files of JSON, one per method and model, named by the model's fingerprint.

    shipped   in this package, for the built-in models
    own       in the cache folder under `calibrations`, written by `kvloom calibrate`; these win, unless others may write there

The fingerprint is that of config and weight files (`engine.model.load`), so a calibration serves a model in every dtype and
weights mode, and never another model.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.engine.errors import ModelError
from kvloom.engine.settings.folders import cache_folder
from kvloom.kernels.trust import foreign

log = logging.getLogger("kvloom.engine")

SHIPPED = Path(__file__).parent


def own_folder() -> Path:
    """Where this machine's own calibrations are."""
    return cache_folder() / "calibrations"


def file_name(method: str, model_key: str) -> str:
    """Of one method's calibration for one model."""
    return f"{method}-{re.sub(r'[^0-9A-Za-z]', '_', model_key)}.json"


def read(method: str, model_key: str) -> dict[str, Any] | None:
    """What is stored, or None; what this user may not see counts for nothing. Raises ModelError if a file is damaged."""
    for folder in (own_folder(), SHIPPED):
        path = folder / file_name(method, model_key)
        try:
            if folder != SHIPPED and (problem := foreign(path)) is not None:
                log.warning("the calibration %s is not used: %s; calibrate again as the user that runs kvloom", path, problem)
                continue
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except PermissionError as error:  # as in a container that runs as another user than the cache folder's
            log.warning("calibrations in %s are not used (%s); set KVLOOM_CACHE to another folder", folder, error)
            continue
        except (OSError, ValueError) as error:
            raise ModelError(f"the calibration {path} cannot be read ({error}); delete it, or calibrate again") from None
        if not isinstance(content, dict) or content.get("model_key") != model_key:
            raise ModelError(f"the calibration {path} is not one of this model; delete it, or calibrate again")
        return content
    return None


def write(method: str, model_key: str, content: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Store a calibration in this machine's own folder, or in `folder`. Complete or not at all. Returns its file."""
    folder = own_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(method, model_key)
    text = json.dumps({**content, "model_key": model_key}, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text)  # innermost lists on one line
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)  # atomic: others see the old file or the whole new one
    return path
