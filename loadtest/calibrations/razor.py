"""Which heads of a model keep the whole sequence: RazorAttention's calibration.

    kvloom calibrate razor [MODEL] [--tokens 600] [--repeats 4] [--seeds 3] [--heatmap FILE.png]

Prompts of random tokens, several times over, show which heads look at earlier copies of a token (echo heads) and at what
followed them (induction heads). The scores of all heads are stored in the cache folder, where the engine finds them by the
model's fingerprint, whatever the dtype or weights mode; shares of heads only decide what is printed and drawn here.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvloom.engine import LLM
from kvloom.engine.calibration import HeadClasses, RazorCalibration, save_razor
from kvloom.engine.calibration.razor import ECHO_SHARE, INDUCTION_SHARE, Scores, best_heads, retrieval_heads
from kvloom.engine.calibration.razor_scores import HeadScores, Pattern, mean_scores, measure, overlaps
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.calibrations import razor_heatmap
from kvloom.loadtest.study.flags import need

console = Console(highlight=False)

HIGH = 0.1
"""A score from which a head is called high in what is printed."""
BELOW = 5
"""Heads shown below those that were chosen."""


class Result(NamedTuple):
    """What was measured and where it is."""

    calibration: RazorCalibration
    classes: HeadClasses
    path: Path


def calibrate(llm: LLM, args: argparse.Namespace) -> Result:
    """Measure, print and store. Raises ConfigError if the pattern does not fit the model or the cache."""
    geometry = llm.core.runner.geometry
    bos = llm.core.runner.decoder.config.bos_token_id
    longest = min(geometry.max_len, geometry.trained_len)
    pattern = Pattern.fitting(longest, llm.model.vocab_size, bos, args.tokens, args.repeats, args.ids)
    seeds = range(args.seed, args.seed + args.seeds)
    console.print(
        f"{len(seeds)} prompts of {pattern.tokens} random tokens, {pattern.repeats} times: {pattern.length} positions"
    )
    measured = [_measure(llm, pattern, seed) for seed in seeds]
    kept = [scores.of_kv_heads(geometry.kv_heads) for scores in measured]
    per_seed = [retrieval_heads(*scores, args.induction_share, args.echo_share) for scores in kept]
    settings = {
        "date": datetime.date.today().isoformat(),
        "tokens": pattern.tokens,
        "repeats": pattern.repeats,
        "ids": [pattern.ids.start, pattern.ids.stop],
        "bos": pattern.bos,
        "seeds": list(seeds),
        "overlap": {
            "induction_share": args.induction_share,
            "echo_share": args.echo_share,
            "jaccard": [round(overlap, 4) for overlap in overlaps(per_seed)],
        },
        "weights": llm.model.weights,
        "dtype": llm.model.dtype,
    }
    induction, echo = (_rounded(scores) for scores in mean_scores(measured).of_kv_heads(geometry.kv_heads))
    calibration = RazorCalibration(
        model_key=geometry.model_key, model=llm.model.name, induction=induction, echo=echo, settings=settings
    )
    classes = calibration.classes(args.induction_share, args.echo_share)
    _print(calibration, classes, args, [scores[0] for scores in kept])
    path = save_razor(calibration, args.folder)
    if args.heatmap is not None:
        razor_heatmap.draw(args.heatmap, calibration, classes)
        console.print(f"scores drawn in {args.heatmap}")
    return Result(calibration, classes, path)


def _measure(llm: LLM, pattern: Pattern, seed: int) -> HeadScores:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar, torch.inference_mode():
        task = bar.add_task(f"seed {seed}", total=pattern.length)
        return measure(llm, pattern, seed, lambda done, total: bar.update(task, completed=done))


def _rounded(scores: Scores) -> Scores:
    """To four digits: what two seeds tell apart is in the first two."""
    return tuple(tuple(float(f"{score:.4g}") for score in row) for row in scores)


def _print(calibration: RazorCalibration, classes: HeadClasses, args: argparse.Namespace, by_seed: Sequence[Scores]) -> None:
    induction, echo = calibration.induction, calibration.echo
    by_induction = set(best_heads(induction, args.induction_share))
    by_echo = set(best_heads(echo, args.echo_share))
    table = Table("layer", "KV head", "induction", "over seeds", "echo", "keeps everything", title="the best heads")
    others = [head for head in best_heads(induction, 1.0) if head not in by_induction | by_echo][:BELOW]
    shown = sorted(by_induction | by_echo, key=lambda at: -induction[at[0]][at[1]]) + others
    for layer, head in shown:
        seen = [scores[layer][head] for scores in by_seed]
        why = [name for name, chosen in (("induction", by_induction), ("echo", by_echo)) if (layer, head) in chosen]
        table.add_row(
            str(layer),
            str(head),
            f"{induction[layer][head]:.3f}",
            f"{min(seen):.3f} to {max(seen):.3f}",
            f"{echo[layer][head]:.3f}",
            " and ".join(why) or "no",
        )
    console.print(table)
    heads = calibration.layers * calibration.kv_heads
    console.print(f"{classes.count} of {heads} KV heads ({classes.share:.1%}) are retrieval heads")
    for name, scores in (("induction", induction), ("echo", echo)):
        values = [score for row in scores for score in row]
        high = sum(value >= HIGH for value in values)
        console.print(f"{name}: {high} heads of {HIGH} or more, median {statistics.median(values):.2g}")
    if overlap := calibration.settings["overlap"]["jaccard"]:
        each = ", ".join(f"{value:.2f}" for value in overlap)
        console.print(f"head sets of {len(by_seed)} seeds, pair by pair, overlap (Jaccard) by {each}")


def _ids(text: str) -> range:
    """A range such as 10000:12500, its end not included."""
    first, colon, last = text.partition(":")
    try:
        return range(int(first), int(last)) if colon else range(0)
    except ValueError:
        return range(0)


def _check(args: argparse.Namespace) -> None:
    """Everything that can be told before the model is loaded. Raises ConfigError."""
    for name in ("induction_share", "echo_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: 0 to 1")
    if args.seeds < 1:
        raise ConfigError(f"--seeds is {args.seeds}; allowed: 1 or more")
    if args.ids is not None:
        if not len(ids := _ids(args.ids)):
            raise ConfigError(f"--ids is {args.ids!r}; allowed: a range of token ids such as 10000:12500")
        args.ids = ids
    if args.heatmap is not None:
        if args.heatmap.suffix.lower() != ".png":
            raise ConfigError(f"--heatmap is {args.heatmap}; allowed: a file that ends in .png")
        need("matplotlib")  # now, not after minutes of measuring


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvloom calibrate razor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument(
        "--induction-share", type=float, default=INDUCTION_SHARE, help="of all KV heads, the best by induction score"
    )
    parser.add_argument("--echo-share", type=float, default=ECHO_SHARE, help="of all KV heads, the best by echo score")
    parser.add_argument(
        "--tokens", type=int, help="random tokens of one copy; 2500, or a third of the context over the repeats, if not given"
    )
    parser.add_argument("--repeats", type=int, default=4, help="copies of them")
    parser.add_argument("--ids", help="token ids to draw from, such as 10000:12500 (its end not included)")
    parser.add_argument("--seeds", type=int, default=3, help="prompts; scores are means over them")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--heatmap", type=Path, metavar="FILE.png", help="draw the scores of all heads")
    parser.add_argument("--weights", default="auto", help="how the model's weights are held meanwhile")
    parser.add_argument("--dtype", default="bf16", help="compute and KV type meanwhile")
    parser.add_argument("--folder", type=Path, help="store the result here instead of the cache folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate one model; returns the exit code."""
    args = _parser().parse_args(argv)
    _check(args)
    llm = LLM(args.model, weights=args.weights, dtype=args.dtype, max_num_seqs=1, max_batched_tokens=1024)
    console.print(f"stored in {calibrate(llm, args).path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
