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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from kvloom.engine import LLM
from kvloom.engine.calibration import TidalChoice, save_tidal
from kvloom.engine.calibration.rows import DecodeRows
from kvloom.engine.calibration.tidal_search import Figures, Judge, TidalSearch
from kvloom.engine.errors import ConfigError
from kvloom.engine.selection.base import Selector
from kvloom.engine.selection.sink_window import SinkWindow, SinkWindowOptions
from kvloom.engine.selection.tidal_decode import TidalDecodeOptions, paper_layers
from kvloom.loadtest.quality.spec import parse_numbers
from kvloom.loadtest.workloads.corpus import TextSource

console = Console(highlight=False)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    layers: tuple[int, ...]
    chosen_on: Figures
    held_out: Figures


def calibrate(llm: LLM, args: argparse.Namespace) -> Path:
    """Measure, print and store. Returns the file. Raises ConfigError if the text does not fit the model or the cache."""
    geometry = llm.core.runner.geometry
    sizes = sorted(set(parse_numbers(args.selections, "--selections")))
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
            plain = TidalDecodeOptions(layers=layers, head_map=False, output=args.output)
            table.append(_row(search, held_out, f"{size} selections, own heads", layers, plain))
            mapped = TidalDecodeOptions(layers=layers, output=args.output)
            table.append(_row(search, held_out, f"{size} selections, mapped heads", layers, mapped))
            other = "dense" if args.output == "sparse" else "sparse"
            flipped = TidalDecodeOptions(layers=layers, output=other)  # type: ignore[arg-type]
            table.append(_row(search, held_out, f"{size} selections, mapped, {other} output", layers, flipped))
            choices.append(TidalChoice(layers=layers, figures=_figures(table[-2], search.mass(layers))))
    _print(table)
    default = max((size for size in sizes if size <= args.default), default=sizes[0])
    settings = {
        "date": datetime.date.today().isoformat(),
        "budget": args.budget,
        "output": args.output,
        "tokens": args.tokens,
        "windows": args.windows,
        "rows": args.rows,
        "weights": llm.model.weights,
        "dtype": llm.model.dtype,
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
    found = {
        "kl": row.chosen_on.kl,
        "top1": row.chosen_on.top1,
        "kl_held_out": row.held_out.kl,
        "top1_held_out": row.held_out.top1,
    }
    return {key: round(value, 5) for key, value in (found if mass is None else {**found, "mass": mass}).items()}


def _text(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _print(rows: Sequence[Row]) -> None:
    table = Table("method", "selection layers", *("KL", "top-1") * 2, title="chosen on, then held out")
    for row in rows:
        figures = [f"{value:.4f}" if i % 2 == 0 else f"{value:.1%}" for i, value in enumerate((*row.chosen_on, *row.held_out))]
        table.add_row(row.name, _text(row.layers), *figures)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvloom calibrate tidal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--selections", default="2,4,7", help="numbers of selection layers to find sets of")
    parser.add_argument(
        "--default", type=int, default=4, help="the set that is used when nobody says otherwise: at most so many"
    )
    parser.add_argument("--dense", type=int, default=1, help="most dense layers before the first selection layer")
    parser.add_argument("--output", choices=("sparse", "dense"), default="sparse", help="of selection layers, while comparing")
    parser.add_argument("--budget", type=int, default=256, help="positions that a row reads")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per window of text")
    parser.add_argument("--windows", type=int, default=8, help="windows to choose on; half as many more are held out")
    parser.add_argument("--rows", type=int, default=32, help="decoded tokens per window")
    parser.add_argument("--weights", default="auto", help="how the model's weights are held meanwhile")
    parser.add_argument("--dtype", default="bf16", help="compute and KV type meanwhile")
    parser.add_argument("--folder", type=Path, help="store the result here instead of the cache folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate one model; returns the exit code."""
    args = _parser().parse_args(argv)
    if min(args.windows, args.rows, args.budget - 15) < 1:
        raise ConfigError("--windows and --rows must be 1 or more, --budget 16 or more")
    rows = args.windows * args.rows
    llm = LLM(args.model, weights=args.weights, dtype=args.dtype, max_num_seqs=rows, max_batched_tokens=max(1024, 2 * rows))
    console.print(f"stored in {calibrate(llm, args)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
