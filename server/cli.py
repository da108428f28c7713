"""The command line: `kvloom serve`, `models`, `plan`, `bench`, `eval`, `calibrate`.

Flags, their help and the YAML keys come from the docstrings of the settings.

Nothing heavy is imported until a command runs. Exit codes: 2 for what the caller wrote wrong, 1 for what could not be done;
each with one line on stderr and no traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvloom.engine.config import EngineConfig, all_options
from kvloom.engine.errors import ConfigError, KVLoomError
from kvloom.engine.settings.options import Option
from kvloom.server import aliases, environment
from kvloom.server.collector import no_collections
from kvloom.server.exit_codes import FAILED, INTERRUPTED, USAGE_ERROR
from kvloom.server.options import ServerOptions, allowed_values, default_text, server_options
from kvloom.version import __version__

MEASUREMENTS = {
    "bench": {
        "serve": ("kvloom.loadtest.load.command", "load on any OpenAI-compatible server: latency, throughput, goodput"),
        "sweep": ("kvloom.loadtest.sweep", "a grid of server settings under the same load, speed beside quality"),
        "report": ("kvloom.loadtest.report", "the report of one run, or several beside each other"),
        "engine": ("kvloom.loadtest.bench.engine", "the engine without HTTP, against what this machine can do"),
        "kernels": ("kvloom.loadtest.bench.kernels", "each kernel against the reference, and against what the device can do"),
        "builds": ("kvloom.loadtest.bench.builds", "ready-made native kernels beside those made for this processor"),
        "paths": (
            "kvloom.loadtest.bench.paths",
            "each loop of the native kernels by rows, beside the one that the table takes",
        ),
        "memory": ("kvloom.loadtest.bench.memory", "what a model takes of memory, beside its file and the KV that is in use"),
        "quota": ("kvloom.loadtest.bench.quota", "decode steps under a control group's quota, by threads"),
        "replicas": ("kvloom.loadtest.bench.replicas", "two replicas beside one engine, and beside other routers"),
        "floods": ("kvloom.loadtest.bench.floods", "what a neighbour feels while somebody floods the server"),
        "soak": (
            "kvloom.loadtest.bench.soak",
            "clients that leave, stop reading or come all at once: is anything lost",
        ),
        "peers": ("kvloom.loadtest.bench.peers", "kvloom beside other servers, with the same client and requests"),
    },
    "eval": {
        "methods": ("kvloom.loadtest.quality.methods", "every selection method: quality, speed and memory in one table"),
        "agreement": ("kvloom.loadtest.quality.agreement", "how far selection methods are from dense on real text"),
        "tasks": ("kvloom.loadtest.quality.task_eval", "long-context tasks by method, length and depth"),
        "long": ("kvloom.loadtest.quality.long", "what a method's own output does to a long generation"),
        "extrapolation": ("kvloom.loadtest.quality.extrapolation", "beyond the trained length: re-indexed or true positions"),
        "retention": ("kvloom.loadtest.quality.retention", "what a retention costs in quality and gains in speed and memory"),
        "ceilings": ("kvloom.loadtest.quality.ceilings", "bytes read by formula and by counters, and what they allow"),
        "drafts": ("kvloom.loadtest.quality.drafts", "sparse drafting: is the output dense, and where does it pay"),
        "kvshare": ("kvloom.loadtest.quality.reuse", "what approximate reuse costs in quality and gains in time"),
        "answers": ("kvloom.loadtest.quality.answer_changes", "how often weight modes change greedy answers"),
        "weights": ("kvloom.loadtest.quality.weights", "what each weight mode costs in quality"),
        "tools": ("kvloom.loadtest.quality.tool_eval", "tool calls of any OpenAI server: which are right, and which needless"),
        "structured": (
            "kvloom.loadtest.quality.structured",
            "structured output: valid answers, what masks cost, who waits",
        ),
        "server": ("kvloom.loadtest.quality.server_eval", "perplexity, agreement and needles of any OpenAI server"),
    },
    "calibrate": {
        "tidal": ("kvloom.loadtest.calibrations.tidal", "choose TidalDecode's layers and heads for a model"),
        "razor": ("kvloom.loadtest.calibrations.razor", "choose RazorAttention's retrieval heads for a model"),
        "kvshare": ("kvloom.loadtest.calibrations.kvshare", "check whether a model may be served with approximate reuse"),
    },
}
"""Commands that live in `loadtest`, which stands above this room: imported by name, only when asked for."""
PLANNED = (
    "model", "dtype", "max_model_len", "device", "block_size", "gpu_memory_utilization", "max_num_seqs", "max_batched_tokens",
)  # fmt: skip
"""Settings that `kvloom plan` takes beside a memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Bad flags end in SystemExit(2), as argparse does."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if len(words) > 1 and words[1] in MEASUREMENTS.get(words[0], ()):
            return _measure(MEASUREMENTS[words[0]][words[1]][0], words[2:])
        arguments = parse(words)
        return int(arguments.run(arguments))
    except ConfigError as error:
        return _fail(error, USAGE_ERROR)
    except (KVLoomError, OSError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    """Tells of an error in one line: the usage of a command with many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command line. Ends the process with one line if they are wrong."""
    parser = _parser()
    words = list(argv or ())
    arguments, unknown = parser.parse_known_args(aliases.flags(words) if words[:1] == ["serve"] else words)
    if unknown:
        flags = [flag for action in arguments.parser._actions for flag in action.option_strings]
        if words[0] == "serve":
            flags += ["--" + name.replace("_", "-") for name in (*aliases.RENAMED, *aliases.SWITCHES, *aliases.ONLY)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        arguments.parser.error(f"unknown argument {unknown[0].split('=')[0]}{hint}")
    return arguments


def _fail(problem: object, code: int) -> int:
    line = " ".join(str(problem).split()).encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
    print(f"kvloom: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvloom", description="An LLM server whose subject is the KV cache.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kvloom {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_models(commands)
    _add_plan(commands)
    texts = {"bench": "measure speed", "eval": "measure quality", "calibrate": "fit a method to a model"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        kinds = command.add_subparsers(title="what", required=True, metavar="WHAT")
        for kind, (_, what) in MEASUREMENTS[name].items():
            kinds.add_parser(kind, help=what)
    return parser


def _measure(module: str, words: list[str]) -> int:
    """Hand over to a measurement, which reads its own flags."""
    try:
        return int(importlib.import_module(module).main(words))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvloom"):
            raise  # a file of ours: not for the caller to install
        raise ConfigError(f"{error.name} is not installed; run in kvloom's checkout: pip install -e '.[bench]'") from None


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible API",
        description="Serve a model over an OpenAI-compatible API. A YAML file given by --config holds the same names, with or "
        "without dashes, and every setting is an environment variable, too: --max-body is $KVLOOM_MAX_BODY. Flags win over the "
        "environment, and that over the file. vLLM's names of these settings are taken, too.",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for section, option in all_options():
        if section not in groups:
            groups[section] = serve.add_argument_group(section.splitlines()[0].rstrip("."))
        _add_flag(groups[section], option)
    http = serve.add_argument_group("The HTTP server")
    for option in server_options():
        _add_flag(http, option)
    text = f"YAML file with any of these settings [${environment.CONFIG}]"
    serve.add_argument("--config", type=Path, metavar="FILE", help=text)
    serve.set_defaults(run=_serve, parser=serve)


def _add_flag(group: Any, option: Option) -> None:
    flag = "--" + option.name.replace("_", "-")
    common = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option)}
    if option.name == "model":
        del common["dest"]
        group.add_argument("model", nargs="?", metavar="MODEL", **common)
    elif option.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif option.type == tuple[str, ...]:
        group.add_argument(flag, action="append", metavar=option.unit, **common)
    else:
        # Values stay text here: `EngineConfig` and `ServerOptions` read those of the command line and of YAML alike.
        values = allowed_values(option)
        group.add_argument(flag, metavar="{" + ",".join(values) + "}" if values else option.unit, **common)


def _help(option: Option) -> str:
    default = default_text(option)
    shown = f"{option.help}{f' (default: {default})' if default else ''} [${environment.variable(option)}]"
    return shown.replace("%", "%%")


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="list and fetch models", allow_abbrev=False)
    actions = models.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="built-in models, and what the cache holds")
    listing.set_defaults(run=_models_list, parser=listing)
    pull = actions.add_parser("pull", help="fetch a model into the cache")
    pull.add_argument("model", metavar="MODEL", help="built-in name or Hugging Face repo id")
    pull.set_defaults(run=_models_pull, parser=pull)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="what fits into a memory, for every retention", allow_abbrev=False)
    size = "for weights and KV cache together, or of a GPU as a whole: 16GiB, 512MiB, ... (default: what is there)"
    plan.add_argument("--memory", metavar="SIZE", help=size)
    for _, option in all_options():
        if option.name in PLANNED:
            _add_flag(plan, option)
    plan.set_defaults(run=_plan, parser=plan)


def _plan(arguments: argparse.Namespace) -> int:
    from kvloom.server.plan_command import plan

    planned = (option for _, option in all_options() if option.name in PLANNED)
    given = environment.settings(os.environ, planned)
    given |= {name: getattr(arguments, name) for name in PLANNED if hasattr(arguments, name)}
    return plan(EngineConfig.from_flat(given), arguments.memory)


def _serve(arguments: argparse.Namespace) -> int:
    config, options = serve_settings(arguments)
    # Until the server handles it: the first process of a container, which a signal without a handler does not end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with no_collections():
        from kvloom.server.serve import serve

    return serve(config, options)


def serve_settings(arguments: argparse.Namespace) -> tuple[EngineConfig, ServerOptions]:
    """Settings from a YAML file, the environment and flags; the later win. Raises ConfigError."""
    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "parser", "config")}
    options = (*(option for _, option in all_options()), *server_options())
    environment.check_names(os.environ, options)
    file = arguments.config or Path(os.environ.get(environment.CONFIG, ""))
    values = read_yaml(file) if file != Path() else {}
    known = {option.name for option in options}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r} in {file}; known: {', '.join(sorted(known))}")
    values |= environment.settings(os.environ, options)
    values |= given
    server_names = {option.name for option in server_options()}
    engine = {key: value for key, value in values.items() if key not in server_names}
    return EngineConfig.from_flat(engine), ServerOptions.from_flat({k: v for k, v in values.items() if k in server_names})


def read_yaml(file: Path) -> dict[str, Any]:
    """A flat mapping of settings. Raises ConfigError if the file is none."""
    import yaml

    from kvloom.engine.settings import strict_yaml

    try:
        content = strict_yaml.load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not YAML{strict_yaml.told(error)}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no mapping; write lines such as port: 8000")
    values = {str(key).replace("-", "_"): value for key, value in (content or {}).items()}
    if len(values) < len(content or {}):
        raise ConfigError(f"--config {file} gives a setting twice, with dashes and with underscores; give it once")
    return aliases.settings(values)


def _models_list(arguments: argparse.Namespace) -> int:
    from kvloom.server.models_command import list_models

    return list_models()


def _models_pull(arguments: argparse.Namespace) -> int:
    from kvloom.server.models_command import pull_model

    return pull_model(arguments.model)


if __name__ == "__main__":
    sys.exit(main())
