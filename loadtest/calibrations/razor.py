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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kvloom.engine import LLM
from kvloom.engine.calibration import HeadClasses, RazorCalibration, save_razor
from kvloom.engine.calibration.razor import ECHO_SHARE, INDUCTION_SHARE, Scores, best_heads, retrieval_heads
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.calibrations import add_held
from kvloom.loadtest.calibrations.razor_scores import HeadScores, Pattern, mean_scores, measure, overlaps
from kvloom.loadtest.study.flags import add_model, need, parser
from kvloom.loadtest.study.pictures import picture
from kvloom.loadtest.study.results import console, console_table
from kvloom.loadtest.study.runner import Steps

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
    shares = {"induction_share": args.induction_share, "echo_share": args.echo_share}
    settings = {
        "date": datetime.date.today().isoformat(),
        "tokens": pattern.tokens,
        "repeats": pattern.repeats,
        "ids": [pattern.ids.start, pattern.ids.stop],
        "bos": pattern.bos,
        "seeds": list(seeds),
        "overlap": {**shares, "jaccard": [round(overlap, 4) for overlap in overlaps(per_seed)]},
        **{name: getattr(llm.model, name) for name in ("weights", "dtype")},
    }
    induction, echo = (_rounded(scores) for scores in mean_scores(measured).of_kv_heads(geometry.kv_heads))
    calibration = RazorCalibration(
        model_key=geometry.model_key, model=llm.model.name, induction=induction, echo=echo, settings=settings
    )
    classes = calibration.classes(args.induction_share, args.echo_share)
    _print(calibration, classes, args, [scores[0] for scores in kept])
    path = save_razor(calibration, args.folder)
    if args.heatmap is not None:
        draw(args.heatmap, calibration, classes)
        console.print(f"scores drawn in {args.heatmap}")
    return Result(calibration, classes, path)


def _measure(llm: LLM, pattern: Pattern, seed: int) -> HeadScores:
    with Steps(pattern.length) as steps, torch.inference_mode():
        steps.name(f"seed {seed}")
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            steps.done(done - before)
            before = done

        return measure(llm, pattern, seed, progress)


def _rounded(scores: Scores) -> Scores:
    """To four digits: what two seeds tell apart is in the first two."""
    return tuple(tuple(float(f"{score:.4g}") for score in row) for row in scores)


def _print(calibration: RazorCalibration, classes: HeadClasses, args: argparse.Namespace, by_seed: Sequence[Scores]) -> None:
    induction, echo = calibration.induction, calibration.echo
    by_induction, by_echo = set(best_heads(induction, args.induction_share)), set(best_heads(echo, args.echo_share))
    others = [head for head in best_heads(induction, 1.0) if head not in by_induction | by_echo][:BELOW]
    rows = []
    for layer, head in (*sorted(by_induction | by_echo, key=lambda at: -induction[at[0]][at[1]]), *others):
        seen = [scores[layer][head] for scores in by_seed]
        why = [name for name, chosen in (("induction", by_induction), ("echo", by_echo)) if (layer, head) in chosen]
        over = f"{min(seen):.3f} to {max(seen):.3f}"
        figures = f"{induction[layer][head]:.3f}", over, f"{echo[layer][head]:.3f}"
        rows.append([str(layer), str(head), *figures, " and ".join(why) or "no"])
    head_row = ("layer", "KV head", "induction", "over seeds", "echo", "keeps everything")
    console.print(console_table(head_row, rows, "the best heads"))
    heads = calibration.layers * calibration.kv_heads
    console.print(f"{classes.count} of {heads} KV heads ({classes.share:.1%}) are retrieval heads")
    for name, scores in (("induction", induction), ("echo", echo)):
        values = [score for row in scores for score in row]
        high = sum(value >= HIGH for value in values)
        console.print(f"{name}: {high} heads of {HIGH} or more, median {statistics.median(values):.2g}")
    if overlap := calibration.settings["overlap"]["jaccard"]:
        each = ", ".join(f"{value:.2f}" for value in overlap)
        console.print(f"head sets of {len(by_seed)} seeds, pair by pair, overlap (Jaccard) by {each}")


def draw(path: Path, calibration: RazorCalibration, classes: HeadClasses) -> None:
    """Write a PNG of all scores: layers down, KV heads across, a panel per score. Framed: the retrieval heads."""
    layers, heads = calibration.layers, calibration.kv_heads
    size = (2.4 + 2 * min(6.0, 0.9 + 0.35 * heads), 1.8 + min(14.0, 0.22 * layers))
    with picture(path, 1, 2, size, 130, sharey=True) as (figure, axes):
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import PowerNorm
        from matplotlib.patches import Rectangle

        for axis, name, scores in zip(axes[0], ("induction", "echo"), (calibration.induction, calibration.echo)):
            norm = PowerNorm(0.5, vmin=0, vmax=1)  # most scores are small: what is a hundredth should be seen
            image = axis.imshow(scores, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
            frames = [Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88) for layer, head in classes.heads]
            axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#ff5a36", linewidth=1.4))
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("KV head", fontsize=9)
            axis.set_xticks(range(0, heads, max(1, heads // 8)))
            axis.set_yticks(range(0, layers, max(1, layers // 16)))
            axis.tick_params(labelsize=8)
        axes[0, 0].set_ylabel("layer", fontsize=9)
        title = f"{calibration.model}\n{classes.count} retrieval heads of {layers * heads} (framed)"
        figure.suptitle(title, fontsize=10)
        figure.colorbar(image, ax=axes, label="mean attention", shrink=0.7)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate one model; returns the exit code."""
    made = parser("calibrate razor", __doc__, allow_abbrev=True)
    add_model(made)
    best = "of all KV heads, the best by {} score"
    made.add_argument("--induction-share", type=float, default=INDUCTION_SHARE, help=best.format("induction"))
    made.add_argument("--echo-share", type=float, default=ECHO_SHARE, help=best.format("echo"))
    copy = "random tokens of one copy; 2500, or a third of the context over the repeats, if not given"
    made.add_argument("--tokens", type=int, help=copy)
    made.add_argument("--repeats", type=int, default=4, help="copies of them")
    made.add_argument("--ids", help="token ids to draw from, such as 10000:12500 (its end not included)")
    made.add_argument("--seeds", type=int, default=3, help="prompts; scores are means over them")
    made.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    made.add_argument("--heatmap", type=Path, metavar="FILE.png", help="draw the scores of all heads")
    add_held(made)
    args = made.parse_args(argv)
    _check(args)
    llm = LLM(args.model, weights=args.weights, dtype=args.dtype, device="cpu", max_num_seqs=1, max_batched_tokens=1024)
    console.print(f"stored in {calibrate(llm, args).path}")
    return 0
