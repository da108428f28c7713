"""What `kvloom serve` shows on the terminal: progress while it loads, then where it listens and how to ask it something.

Everything goes to stderr; on a terminal progress is a bar, elsewhere one line per stage. With --log-format json all of it is
log records instead.
"""

from __future__ import annotations

import json
import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvloom.engine.client import EngineStats, ModelInfo
from kvloom.engine.requests.sampling import OPENAI_SAMPLING
from kvloom.server import logs
from kvloom.server.logs import LogFormat
from kvloom.server.options import ServerOptions

log = logging.getLogger("kvloom.server")

ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
FIRST_QUESTION = "What is the capital of Japan?"
"""The built-in model answers it rightly as it is served; README asks the same."""
LONGEST_SETTING = 80
"""Characters of a setting that are shown: a chat template may be written on the command line."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class LoadingBars:
    """A progress callback, `bars(stage, done, total)`, with one bar per stage. Use as a context manager."""

    def __init__(self, form: LogFormat = "text") -> None:
        self._json = form == "json"
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            console=self._console, disable=self._json or not self._console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LoadingBars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def interrupted(self) -> None:
        """Take the bars away and say that loading was broken off."""
        self._progress.stop()
        if self._json:
            log.warning("interrupted while loading")
        else:
            print("kvloom: interrupted while loading", file=sys.stderr, flush=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`stage` is `done` of `total` along, in any unit; a total of 0 is not known yet."""
        if stage not in self._tasks:
            if self._json:
                log.info("%s", stage)
            elif not self._console.is_terminal:
                print(f"{stage} ...", file=sys.stderr, flush=True)
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)


def banner(model: ModelInfo, stats: EngineStats, options: ServerOptions, port: int) -> None:
    """Print the address, the model, the KV capacity and a command to paste."""
    url = base_url(options, port)
    if options.log_format == "json":
        told = logs.fields(model=model.name, url=url, device=model.device, backend=model.backend, weights=model.weights,
                           max_model_len=model.max_model_len, capacity_tokens=stats.capacity_tokens,
                           settings=dict(model.settings))  # fmt: skip
        log.info("kvloom serves %s at %s", model.name, url, extra=told)
        return
    open_to_all = options.host not in LOOPBACK and not (options.api_key or options.tenant_keys)
    warning = "  anyone who can reach this address may use it: set --api-key\n" if open_to_all else ""
    print(
        f"\nkvloom serves {model.name} at {url}\n"
        f"  model     {model.root} ({model.dtype}, {model.backend} kernels{_library(model)} on {model.device}{_build(model)})\n"
        f"{_paths(model)}{_device(model)}"
        f"  weights   {model.weights}{': ' * bool(model.weights_held)}{model.weights_held}\n"
        f"  threads   {model.threads}\n"
        f"  context   {model.max_model_len} tokens\n"
        f"  sampling  {_sampling(model)}\n"
        f"  KV cache  {stats.capacity_tokens} tokens in blocks of {stats.block_size}{_groups(stats)}\n"
        f"  state     {stats.selection_capacity / (1 << 20):.4g} MiB for selection methods\n"
        f"{_settings(model)}{warning}\n"
        f"Try:\n  {curl_line(options, url, model.name)}\n",
        file=sys.stderr,
        flush=True,
    )


def _build(model: ModelInfo) -> str:
    """Which build of the kernels runs, if there are several."""
    return f", {model.build}" if model.build else ""


def _paths(model: ModelInfo) -> str:
    """A line with the loops that those kernels take, if there is a choice."""
    return f"  kernels   {model.paths}\n" if model.paths else ""


def _library(model: ModelInfo) -> str:
    return f" and {model.attention}" if model.attention else ""


def _device(model: ModelInfo) -> str:
    """A line with which device that is, or why it is no other, if there is anything to say."""
    return f"  device    {model.device}: {model.device_note}\n" if model.device_note else ""


def _sampling(model: ModelInfo) -> str:
    """What requests that do not say are sampled with, as far as it does something, and who says so."""
    neutral = OPENAI_SAMPLING._asdict()
    shown = {name: value for name, value in model.sampling.said().items()
             if value != neutral[name] or name in ("temperature", "top_p")}  # fmt: skip
    return ", ".join(f"{name} {value:g}" for name, value in shown.items()) + f" ({model.sampling_source})"


def _settings(model: ModelInfo) -> str:
    """A line with the settings that are not at their default, if there are any."""
    if not model.settings:
        return ""
    flags = (f"--{name.replace('_', '-')} {str(value)[:LONGEST_SETTING]}" for name, value in model.settings.items())
    return f"  settings  {' '.join(flags)}\n"


def _groups(stats: EngineStats) -> str:
    """Blocks of every head group, if there are several."""
    if len(stats.groups) == 1:
        return ""
    return " (" + ", ".join(f"{group.total} {group.name}" for group in stats.groups) + ")"


def base_url(options: ServerOptions, port: int) -> str:
    """A URL that reaches the server from this machine."""
    host = "127.0.0.1" if options.host in ANY_ADDRESS else options.host
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl_line(options: ServerOptions, url: str, model: str) -> str:
    """A shell command that asks the server something. It names no key: a terminal's scrollback is no place for one."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": FIRST_QUESTION}]})
    quoted = body.replace("'", "'\\''")
    key = " -H 'Authorization: Bearer YOUR_KEY'" if (options.api_key or options.tenant_keys) else ""
    insecure = " -k" if url.startswith("https") else ""
    return f"curl{insecure} {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{quoted}'"
