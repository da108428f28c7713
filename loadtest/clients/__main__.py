"""`make clients`: real clients from the package indexes against a served process, one table of what passed.

    python -m kvloom.loadtest.clients [--model MODEL] [--only NAME] [--publish docs/figures/client-libraries.json]

Every client is installed, pinned, into an environment of its own under build/clients and kept there. Its script
(`loadtest/clients/cases`) runs as its users' would: it knows nothing of kvloom but the address, the model's name and a folder
with its tokenizer. vLLM, too large to be installed for this, runs from an environment that the variable CLIENTS_VLLM names, or
not at all. Exit code 0 only if every case that was run passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvloom.engine.errors import ConfigError, ModelError, ModelNotFoundError
from kvloom.loadtest.client.servers import Server, running
from kvloom.loadtest.clients.clients import CASES, CLIENTS, Client
from kvloom.loadtest.figures import markdown, publish
from kvloom.loadtest.study.flags import add_publish
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import console
from kvloom.loadtest.workloads.corpus import TextSource

SCRIPTS = Path(__file__).with_name("cases")
SECONDS = 600.0
"""For all cases of one client."""
NAME = "model"
INSTALL = Path(__file__).resolve().parents[2] / "scripts" / "install.py"
KEY = "none"
"""Of the server, so that it is seen how clients send theirs; `cases.report` has it, too."""


class InstallError(Exception):
    """A client could not be installed."""


class NotHereError(Exception):
    """Nobody has said where a client is that this does not install."""


def installed(client: Client, cache: Path) -> list[str]:
    """The command that runs a client's script, in an environment that holds its pinned packages. Raises InstallError, or
    NotHereError."""
    if client.home:
        return _found(client)
    folder = cache / f"{re.sub('[/ ]', '-', client.name.strip('@'))}-{client.version}"
    stamp = folder / ".installed"
    if client.npm:
        if not stamp.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _do(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *client.packages])
        for script in SCRIPTS.glob("*.mjs"):  # a script finds packages beside itself
            shutil.copy(script, folder)
        command = ["node", str(folder / client.script)]
    else:
        if not stamp.exists():
            _do([sys.executable, "-m", "venv", "--clear", str(folder)])
            if client.torch:
                _do([str(folder / "bin" / "python"), str(INSTALL), "--only-torch"])
            _do([str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *client.packages])
        command = [str(folder / "bin" / "python"), str(SCRIPTS / client.script)]
    stamp.touch()
    return command


def _found(client: Client) -> list[str]:
    package, _, pinned = client.packages[0].partition("==")
    if not (home := os.environ.get(client.home)):
        raise NotHereError(f"{client.home} names no environment with {client.packages[0]}")
    python = str(Path(home).absolute() / "bin" / "python")
    there = _do([python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]).strip()
    if there != pinned:
        raise InstallError(f"{client.home} has {package} {there}; wanted: {pinned}")
    return [python, str(SCRIPTS / client.script)]


def _do(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise InstallError(f"{' '.join(command)[:200]}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def write_tokenizer(model: str, folder: Path) -> None:
    """What transformers reads of a model's tokenizer, for clients that count tokens by themselves. model: a built-in name, a
    folder or a .gguf file. Raises ModelError, ModelNotFoundError."""
    made = TextSource.load(model).tokenizer
    made.backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": made.special_text(made.bos_id), "eos_token": made.special_text(next(iter(made.eos_ids), None))}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": made.chat_template, **names}
    told = {key: value for key, value in settings.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def problems(command: Sequence[str], settings: Mapping[str, str]) -> dict[str, str]:
    """What went wrong in each case that a script tried; an empty text for nothing."""
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "AI_SDK_LOG_WARNINGS": "false"}
    try:
        done = subprocess.run(command, env={**os.environ, **quiet, **settings}, capture_output=True, text=True, timeout=SECONDS)
        said, rest = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        said, rest = (late.stdout or b"").decode(errors="replace"), f"not done after {SECONDS:.0f} s"
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"case')]
    names = lines[0]["cases"] if lines else ["text"]
    undone = f"the script ended: {rest.strip()[-300:]}"
    return {**dict.fromkeys(names, undone), **{line["case"]: line["problem"] for line in lines[1:]}}


def row(client: Client, found: Mapping[str, str]) -> list[str]:
    """Of the table: passed, failed, or a dash for what a client does not have."""
    cells = ["-" if case not in found else "failed" if found[case] else "passed" for case in CASES]
    return [client.name, client.version, *cells]


def merged(path: Path, rows: list[list[str]]) -> list[list[str]]:
    """These rows, and those of other clients that the file holds of the same versions; in the order of CLIENTS. A client with
    neither was not run."""
    known = {tuple(row[:2]): row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    known |= {tuple(row[:2]): row for row in rows}
    wanted = [(client.name, client.version) for client in CLIENTS]
    return [known.get(key, [*key, "not run", *["-"] * (len(CASES) - 1)]) for key in wanted]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.clients", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--model", default="smollm2", help="what to serve (default: %(default)s)")
    made.add_argument("--url", help="a server that runs already with --api-key none, such as http://127.0.0.1:8000; "
                      "its model is called --model")  # fmt: skip
    made.add_argument("--tool-choice", choices=("required", "auto"), default="required",
                      help="auto leaves it to the model whether it calls (default: %(default)s)")  # fmt: skip
    made.add_argument("--tokenizer", help="of the model, for clients that count tokens by themselves: built-in name, folder or "
                      ".gguf file (default: --model)")  # fmt: skip
    made.add_argument("--only", action="append", metavar="NAME", help="clients to run, all by default")
    made.add_argument(
        "--cache", type=Path, default=Path("build/clients"), help="environments of clients (default: %(default)s)"
    )
    add_publish(made)
    args = made.parse_args(argv)
    unknown = set(args.only or ()) - {client.name for client in CLIENTS}
    if unknown:
        raise ConfigError(f"--only is {unknown.pop()!r}; allowed: {', '.join(client.name for client in CLIENTS)}")
    return args


def attempt(args: argparse.Namespace, url: str, model: str, tokenizer: Path) -> tuple[list[list[str]], bool]:
    """Run every client; the table's rows, and whether everything passed."""
    rows, passed = [], True
    settings = {"KVLOOM_URL": f"{url}/v1", "KVLOOM_MODEL": model, "KVLOOM_TOOL_CHOICE": args.tool_choice,
                "KVLOOM_TOKENIZER": str(tokenizer)}  # fmt: skip
    for client in CLIENTS:
        if args.only and client.name not in args.only:
            continue
        try:
            found = problems(installed(client, args.cache.absolute()), settings)
        except NotHereError as error:
            console.print(f"{client.name} {client.version}: not run: {error}", markup=False)
            continue
        except InstallError as error:
            found = {"text": f"not installed: {error}"}
        for case, problem in found.items():
            console.print(
                f"{client.name} {client.version}: {case}: {' '.join(problem.split())[:300] or 'passed'}", markup=False
            )
        rows.append(row(client, found))
        passed &= not any(found.values())
    return rows, passed


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table; returns the exit code."""
    try:
        args = parse(argv)
    except ConfigError as error:
        console.print(f"python -m kvloom.loadtest.clients: {error}", markup=False, soft_wrap=True)
        return 2
    with tempfile.TemporaryDirectory() as made:
        try:
            write_tokenizer(args.tokenizer or args.model, Path(made))
        except (ModelError, ModelNotFoundError) as error:
            console.print(f"python -m kvloom.loadtest.clients: --tokenizer: {error}", markup=False, soft_wrap=True)
            return 2
        flags = f"--served-model-name {NAME} --api-key {KEY} --port {{port}}"
        command = f"{sys.executable} -m kvloom.server.cli serve {args.model} {flags}"
        with running(Server("kvloom", command, args.url), Path(made)) as started:
            rows, passed = attempt(args, started.url, args.model if args.url else NAME, Path(made))
    head = ["client", "version", *CASES]
    console.print(markdown(head, rows), markup=False, soft_wrap=True)
    if args.publish:
        note = f"Model: {Path(args.model).name}; tool_choice {args.tool_choice}. {describe()}."
        publish(args.publish, head, merged(args.publish, rows), note, command="make clients")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
