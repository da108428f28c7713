"""Which layers of a model should choose for the others: TidalDecode's calibration.

    kvloom calibrate tidal [MODEL] [--selections 2,4,7] [--budget 256] [--tokens 2048] [--windows 8] [--rows 32]

Real text is decoded, token by token as given, with everything visible and with candidates; sets of selection layers and the
head map are chosen on some windows, and their figures taken on others. The result is stored in the cache folder, where the
engine finds it by the model's fingerprint, whatever the dtype or weights mode.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kvloom.engine import LLM
from kvloom.engine.calibration import TidalChoice, save_tidal
from kvloom.engine.errors import ConfigError
from kvloom.engine.selection.base import Selector
from kvloom.engine.selection.sink_window import SinkWindow, SinkWindowOptions
from kvloom.engine.selection.tidal_decode import TidalDecodeOptions, paper_layers
from kvloom.loadtest.calibrations import add_held
from kvloom.loadtest.calibrations.rows import DecodeRows
from kvloom.loadtest.calibrations.tidal_search import Figures, Judge, TidalSearch
from kvloom.loadtest.study.flags import add_model, numbers, parser
from kvloom.loadtest.study.results import console, console_table
from kvloom.loadtest.workloads.corpus import TextSource


class Row(NamedTuple):
    """A line of the table."""

    name: str
    layers: tuple[int, ...]
    chosen_on: Figures
    held_out: Figures


def calibrate(llm: LLM, args: argparse.Namespace) -> Path:
    """Measure, print and store. Returns the file. Raises ConfigError if the text does not fit the model or the cache."""
    geometry = llm.core.runner.geometry
    sizes = sorted(set(numbers(args.selections, "--selections")))
    firsts = range(1, args.dense + 1) if args.dense else (0,)
    _check(args, geometry.layers, geometry.max_len, sizes)
    source = TextSource(llm.tokenizer)
    reader = source.reader("calibration")
    texts = [reader.tokens(args.tokens) for _ in range(args.windows + max(1, args.windows // 2))]
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        console.print(f"reading {len(texts)} windows of {args.tokens} tokens")
        rows = stack.enter_context(DecodeRows(llm, texts[: args.windows], args.rows))
        held_out = Judge(stack.enter_context(DecodeRows(llm, texts[args.windows :], args.rows)))
        search = TidalSearch(llm, rows, args.budget, args.output)
        table, choices = _baselines(llm, search, held_out), []
        for size in sizes:
            layers = search.choose(size, firsts, lambda layers, kl: console.print(f"  {_text(layers):<32} KL {kl:.4f}"))
            other = "dense" if args.output == "sparse" else "sparse"
            for name, head_map, output in (
                ("own heads", False, args.output), ("mapped heads", True, args.output), (f"mapped, {other} output", True, other)
            ):  # fmt: skip
                options = TidalDecodeOptions(layers=layers, head_map=head_map, output=output)  # type: ignore[arg-type]
                table.append(_row(search, held_out, f"{size} selections, {name}", layers, options))
            choices.append(TidalChoice(layers=layers, figures=_figures(table[-2], search.mass(layers))))
    _print(table)
    default = max((size for size in sizes if size <= args.default), default=sizes[0])
    settings = {
        "date": datetime.date.today().isoformat(),
        **{name: getattr(args, name) for name in ("budget", "output", "tokens", "windows", "rows")},
        **{name: getattr(llm.model, name) for name in ("weights", "dtype")},
        "text": source.fingerprint,
        "reference": {row.name: _figures(row) for row in table[:3]},
    }
    return save_tidal(search.result(llm.model.name, tuple(choices), default, settings), args.folder)


def _check(args: argparse.Namespace, layers: int, longest: int, sizes: list[int]) -> None:
    if not 0 <= args.dense < layers:
        raise ConfigError(f"--dense is {args.dense}; allowed: 0 to {layers - 1}")
    if sizes[-1] > layers - max(1, args.dense):
        raise ConfigError(f"--selections has {sizes[-1]}; allowed for {layers} layers: up to {layers - max(1, args.dense)}")
    if not args.budget + args.rows < args.tokens <= longest:
        raise ConfigError(
            f"--tokens is {args.tokens}; allowed: more than budget + rows, {args.budget + args.rows}, up to {longest}"
        )


def _baselines(llm: LLM, search: TidalSearch, held_out: Judge) -> list[Row]:
    """The cheap method at the same budget, and the paper's two layers without and with the head map."""
    kernels = llm.core.runner.decoder.kernels
    window = SinkWindow(SinkWindowOptions(), search.budget, search.geometry, kernels)
    layers = paper_layers(search.geometry.layers)
    return [
        Row("sinks and window", (), search.judge(window), held_out(window)),
        _row(search, held_out, "the paper's layers, own heads", layers, TidalDecodeOptions(layers=layers, head_map=False)),
        _row(search, held_out, "the paper's layers, mapped heads", layers, TidalDecodeOptions(layers=layers)),
    ]


def _row(search: TidalSearch, held_out: Judge, name: str, layers: tuple[int, ...], options: TidalDecodeOptions) -> Row:
    selector: Selector = search.selector(options)
    return Row(name, layers, search.judge(selector), held_out(selector))


def _figures(row: Row, mass: float | None = None) -> dict[str, float]:
    on, out = row.chosen_on, row.held_out
    found = {"kl": on.kl, "top1": on.top1, "kl_held_out": out.kl, "top1_held_out": out.top1}
    return {key: round(value, 5) for key, value in (found if mass is None else {**found, "mass": mass}).items()}


def _text(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _print(rows: Sequence[Row]) -> None:
    cells = [[f"{value:.4f}" if i % 2 == 0 else f"{value:.1%}" for i, value in enumerate((*row.chosen_on, *row.held_out))]
             for row in rows]  # fmt: skip
    head = ("method", "selection layers", *("KL", "top-1") * 2)
    lines = [[row.name, _text(row.layers), *figures] for row, figures in zip(rows, cells)]
    console.print(console_table(head, lines, "chosen on, then held out"))


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate one model; returns the exit code."""
    made = parser("calibrate tidal", __doc__, allow_abbrev=True)
    add_model(made)
    made.add_argument("--selections", default="2,4,7", help="numbers of selection layers to find sets of")
    most = "the set that is used when nobody says otherwise: at most so many"
    made.add_argument("--default", type=int, default=4, help=most)
    made.add_argument("--dense", type=int, default=1, help="most dense layers before the first selection layer")
    made.add_argument("--output", choices=("sparse", "dense"), default="sparse", help="of selection layers, while comparing")
    made.add_argument("--budget", type=int, default=256, help="positions that a row reads")
    made.add_argument("--tokens", type=int, default=2048, help="tokens per window of text")
    made.add_argument("--windows", type=int, default=8, help="windows to choose on; half as many more are held out")
    made.add_argument("--rows", type=int, default=32, help="decoded tokens per window")
    add_held(made)
    args = made.parse_args(argv)
    if min(args.windows, args.rows, args.budget - 15) < 1:
        raise ConfigError("--windows and --rows must be 1 or more, --budget 16 or more")
    rows = args.windows * args.rows
    settings = {"max_num_seqs": rows, "max_batched_tokens": max(1024, 2 * rows)}
    llm = LLM(args.model, weights=args.weights, dtype=args.dtype, device="cpu", **settings)
    console.print(f"stored in {calibrate(llm, args)}")
    return 0
