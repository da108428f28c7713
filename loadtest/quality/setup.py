"""What every `kvloom eval` of methods begins with: its flags, its engine, its text, its progress bar, its end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvloom.engine import LLM
from kvloom.engine.errors import ConfigError
from kvloom.loadtest.figures import add_publish
from kvloom.loadtest.quality import spec
from kvloom.loadtest.quality.decoding import Passage
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import Results
from kvloom.loadtest.workloads.corpus import sections, windows

console = Console(highlight=False)
INTERRUPTED = 130


def parser(prog: str, about: str | None) -> argparse.ArgumentParser:
    """Flags that all of them have."""
    made = argparse.ArgumentParser(prog=f"kvloom eval {prog}", description=(about or "").split("\n")[0], allow_abbrev=False)
    made.add_argument("model", nargs="?", default="smollm2")
    for name, default in (("dtype", "bf16"), ("weights", "auto"), ("backend", "auto"), ("kv-memory", "4GiB")):
        made.add_argument(f"--{name}", default=default, help="as in kvloom serve (default: %(default)s)")
    made.add_argument("--threads", type=_count, help="compute threads (default: one per core)")
    made.add_argument(
        "--methods", default="dense,sink_window", help="NAME or NAME:OPTION=VALUE:..., comma-separated (default: %(default)s)"
    )
    made.add_argument("--budgets", default="128,256,512", help="positions a sparse row reads (default: %(default)s)")
    made.add_argument("--batch", type=_count, default=8, help="requests that decode at once (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--text", type=Path, help="a text file to measure on (default: the Python reference, about 85,000 tokens)"
    )
    made.add_argument("--json", type=Path, help="write rows into this file")
    made.add_argument("--markdown", type=Path, help="write the table into this file")
    add_publish(made)
    made.add_argument("--resume", action="store_true", help="keep the rows that --json holds already for the same settings")
    return made


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


count = _count


def engine(args: argparse.Namespace, specs: Sequence[spec.MethodSpec]) -> LLM:
    """Load the model, and check that it knows every method. Raises ModelError, ConfigError or InvalidRequestError.

    Shadow passes are off: they are read by nobody here, and would count as bytes read.
    """
    made = LLM(
        args.model,
        dtype=args.dtype,
        weights=args.weights,
        backend=args.backend,
        kv_memory=args.kv_memory,
        threads=args.threads,
        max_num_seqs=max(64, args.batch),
        shadow_interval=0,
    )
    spec.check(made, specs)
    return made


def about(llm: LLM) -> dict[str, Any]:
    """What every row says of the model and the machine."""
    model = llm.model
    return {
        "model": Path(model.name).name,
        "dtype": model.dtype,
        "weights": model.weights,
        "backend": model.backend,
        "machine": describe(),
    }


def described(llm: LLM) -> str:
    """The same in a sentence, for the end of a report."""
    said = about(llm)
    return (
        f"{said['model']}, {said['dtype']}, weights {said['weights']}, {said['backend']} kernels. Measured {said['machine']}."
    )


def real_text(llm: LLM, file: Path | None) -> list[int]:
    """Tokens of a file, or of Python's reference with every paragraph once. Raises ConfigError if it cannot be read."""
    if file is None:
        return llm.tokenizer.encode("\n\n".join(section.text for section in sections()), add_special_tokens=False)
    try:
        return llm.tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def passages(llm: LLM, text: list[int], context: int, forced: int, count: int) -> list[Passage]:
    """Windows of a text: `context` tokens of prompt and `forced` to follow. Raises ConfigError if they cannot be had."""
    longest = llm.core.limits.max_model_len
    if context + forced > longest:
        raise ConfigError(f"{context} tokens of context and {forced} to decode exceed the {longest} of {llm.model.name}")
    try:
        found = windows(text, context + forced, count)
    except ValueError as error:
        raise ConfigError(f"{error}; lower --windows or --context") from None
    return [Passage(tuple(window[:context]), tuple(window[context:])) for window in found]


def warn_of_room(llm: LLM, tokens: int) -> None:
    """Say if prompts will not stay in the cache between measurements."""
    have = llm.core.cache.capacity_tokens
    if tokens > have:
        console.print(
            f"[yellow]the KV cache holds {have:,} tokens, this run wants {tokens:,}: prompts will be computed again for every "
            "method; give more --kv-memory to save that time"
        )


LINE_SECONDS = 10.0
"""Where there is no terminal, a line of progress at most so often."""


class Steps:
    """Progress over a known number of steps, each with a name: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total)
        self._done, self._total, self._clock, self._said = 0, total, clock, -LINE_SECONDS

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def name(self, what: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=what)
        if self._bar.disable and self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            console.print(f"{self._done}/{self._total} {what}", markup=False)

    def done(self) -> None:
        """One step more."""
        self.skip(1)

    def skip(self, steps: int) -> None:
        """Steps that need not be done."""
        self._done += steps
        self._bar.advance(self._task, steps)


def finish(results: Results, measure: Callable[[], None]) -> int:
    """Run a measurement to its end, to Ctrl-C or to an error; print and write what there is. Returns the exit code."""
    code = 0
    try:
        measure()
    except KeyboardInterrupt:
        code = INTERRUPTED
        console.print(f"[yellow]interrupted: {len(results.rows)} rows were measured")
    finally:
        if results.rows:
            results.write()
            console.print(results.text(), soft_wrap=True, markup=False)
            for path in (results.json, results.markdown, results.publish):
                if path is not None:
                    console.print(f"written: {path}")
    return code
