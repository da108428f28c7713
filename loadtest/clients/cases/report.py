"""What every script of this folder shares. They run in environments of their own, without kvloom: run as scripts, they import
this file by its name.

The settings come in the environment: KVLOOM_URL (with /v1), KVLOOM_MODEL, KVLOOM_TOOL_CHOICE (auto or required).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping

URL = os.environ.get("KVLOOM_URL", "")
MODEL = os.environ.get("KVLOOM_MODEL", "")
TOOL_CHOICE = os.environ.get("KVLOOM_TOOL_CHOICE", "required")
KEY = "none"
QUESTION = "What is the weather in Bonn? Use the tool get_weather."
RESULT = "Rain, 12 degrees."
MAX_TOKENS = 128
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 40}}, "required": ["city"]},
    },
}


def require(ok: object, what: str) -> None:
    """Raises AssertionError unless `ok`."""
    if not ok:
        raise AssertionError(what)


def run(cases: Mapping[str, Callable[[], object]]) -> None:
    """Run each case. Prints lines of JSON: the names of all, then for each what went wrong, if anything did."""
    print(json.dumps({"cases": list(cases)}), flush=True)
    for name, case in cases.items():
        problem = ""
        try:
            case()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print("\n" + json.dumps({"case": name, "problem": problem}), flush=True)  # libraries leave lines unfinished
