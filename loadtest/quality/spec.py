"""Which methods a quality run compares: names, budgets and options, as they are written on the command line.

    dense,sink_window,token_select:theta=0.9:pool=7,tidal_decode:layers=[2,16]

Every sparse method is measured at every budget, and the cheap baseline stands beside it at the same ones.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.engine.requests.request import KVOptions, Request
from kvloom.engine.requests.sampling import SamplingParams
from kvloom.engine.selection import METHODS
from kvloom.engine.selection.base import read_options
from kvloom.loadtest.study.flags import add, add_engine, add_model, add_outputs, add_resume, numbers
from kvloom.loadtest.study.results import Column, Row
from kvloom.loadtest.study.runner import Case, engine

DENSE = "dense"
BASELINE = "sink_window"
METHOD_COLUMNS = (Column("method", "method"), Column("budget", "budget"), Column("options", "options"))
COST_COLUMNS = (
    Column("step ms", "step_ms", ".1f"),
    Column("MB read", "bytes_read", ".1f", 1e-6),
    Column("positions read", "attended_share", ".1%"),
    Column("KV MB", "kv_bytes", ".1f", 1e-6),
)
"""Of `MethodSpec.row`, and of `Cost.figures`."""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One method as it is measured."""

    method: str
    budget: int | None = None
    """Positions a sparse decode row reads; None for dense."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own."""

    @property
    def kv(self) -> KVOptions:
        """What its requests carry."""
        return KVOptions(selection=self.method, budget=self.budget, options=dict(self.options))

    @property
    def row(self) -> Row:
        """What tells its rows from other methods'."""
        return {"method": self.method, "budget": self.budget, "options": dict(self.options)}

    @property
    def label(self) -> str:
        """Short and unique in a run, such as `token_select theta=0.9 @ 256`."""
        parts = [self.method, *(f"{key}={json.dumps(value)}" for key, value in self.options.items())]
        return " ".join(parts) + ("" if self.budget is None else f" @ {self.budget}")


def parse_methods(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names with options. Raises ConfigError showing what cannot be read."""
    found = []
    for part in re.split(r",(?![^\[]*\])", text):  # not inside [...]
        name, *settings = part.strip().split(":")
        if not name or any("=" not in setting for setting in settings):
            raise ConfigError(f"--methods has {part!r}; write NAME or NAME:OPTION=VALUE:..., separated by commas")
        found.append((name, {key: _value(value) for key, value in (setting.split("=", 1) for setting in settings)}))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def plan(methods: str, budgets: str, *, baseline: bool = True) -> list[MethodSpec]:
    """What to measure, in order: dense, budget by budget the baseline and every method, then methods without a budget.

    Raises ConfigError, or InvalidRequestError for an option that a method does not have.
    """
    chosen = [(name, options) for name, options in parse_methods(methods) if name != DENSE]
    if baseline and chosen and all(name != BASELINE for name, _ in chosen):
        chosen.insert(0, (BASELINE, {}))
    sizes = numbers(budgets, "--budgets")
    without = [MethodSpec(name, None, options) for name, options in chosen if not _takes_budget(name, options)]
    chosen = [(name, options) for name, options in chosen if _takes_budget(name, options)]
    return [MethodSpec(DENSE), *(MethodSpec(name, size, options) for size in sizes for name, options in chosen), *without]


def _takes_budget(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a method reads more or less by a budget. Unknown names do here; `check` refuses them."""
    method = METHODS.get(name)
    return method is None or method.takes_budget(read_options(method, options))


def cases(specs: Sequence[MethodSpec]) -> list[Case]:
    """A row for each."""
    return [Case(spec, spec.label, spec.row) for spec in specs]


def add_flags(made: Any) -> None:
    """Flags of every study of methods: the engine, the methods, the text, where results go."""
    add_model(made)
    add_engine(made)
    add_methods(made, "dense,sink_window")
    add(made, ("batch", 8, "requests that decode at once"))
    made.add_argument("--seed", type=int, default=0)
    text = "a text file to measure on (default: the Python reference, about 85,000 tokens)"
    made.add_argument("--text", type=Path, help=text)
    add_outputs(made)
    add_resume(made)


def add_methods(made: Any, default: str) -> None:
    """Which methods, and at which budgets."""
    methods = "NAME or NAME:OPTION=VALUE:..., comma-separated"
    add(made, ("methods", default, methods), ("budgets", "128,256,512", "positions a sparse row reads"), kind=str)


def engine_for(args: argparse.Namespace, specs: Sequence[MethodSpec]) -> LLM:
    """An engine that knows every method. Raises ModelError, ConfigError or InvalidRequestError."""
    made = engine(args, max_num_seqs=max(64, args.batch))
    check(made, specs)
    return made


def check(llm: LLM, specs: Sequence[MethodSpec]) -> None:
    """Have the engine look at every spec before anything expensive runs. Raises its InvalidRequestError, naming the key."""
    for spec in specs:
        llm.core.add(Request(id="check", prompt=[0], sampling=SamplingParams(max_tokens=1), kv=spec.kv))
        llm.core.abort("check")
