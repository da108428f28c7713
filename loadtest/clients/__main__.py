"""`make clients`: real clients from the package indexes against a served process, one table of what passed.

    python -m kvloom.loadtest.clients [--model MODEL] [--only NAME] [--publish docs/figures/client-libraries.json]

Every client is installed, pinned, into an environment of its own under build/clients and kept there. Its script
(`loadtest/clients/cases`) runs as its users' would: it knows nothing of kvloom but the address. Exit code 0 only if every case
passed.
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

from kvloom.engine.errors import ConfigError
from kvloom.loadtest.client.servers import Server, running
from kvloom.loadtest.clients.clients import CASES, CLIENTS, Client
from kvloom.loadtest.figures import markdown, publish
from kvloom.loadtest.study.flags import add_publish
from kvloom.loadtest.study.machine import describe
from kvloom.loadtest.study.results import console

SCRIPTS = Path(__file__).with_name("cases")
SECONDS = 600.0
"""For all cases of one client."""
NAME = "model"
KEY = "none"
"""Of the server, so that it is seen how clients send theirs; `cases.report` has it, too."""


class InstallError(Exception):
    """A client could not be installed."""


def installed(client: Client, cache: Path) -> list[str]:
    """The command that runs a client's script, in an environment that holds its pinned packages. Raises InstallError."""
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
            _do([str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *client.packages])
        command = [str(folder / "bin" / "python"), str(SCRIPTS / client.script)]
    stamp.touch()
    return command


def _do(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise InstallError(f"{' '.join(command)[:200]}: {(done.stderr or done.stdout).strip()[-300:]}")


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
    """These rows, and those of other clients that the file holds of the same versions; in the order of CLIENTS."""
    known = {tuple(row[:2]): row for row in (json.loads(path.read_text())["rows"] if path.exists() else [])}
    known |= {tuple(row[:2]): row for row in rows}
    wanted = [(client.name, client.version) for client in CLIENTS]
    return [known[key] for key in wanted if key in known]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.clients", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--model", default="smollm2", help="what to serve (default: %(default)s)")
    made.add_argument("--url", help="a server that runs already with --api-key none, such as http://127.0.0.1:8000; "
                      "its model is called --model")  # fmt: skip
    made.add_argument("--tool-choice", choices=("required", "auto"), default="required",
                      help="auto leaves it to the model whether it calls (default: %(default)s)")  # fmt: skip
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


def attempt(args: argparse.Namespace, url: str, model: str) -> tuple[list[list[str]], bool]:
    """Run every client; the table's rows, and whether everything passed."""
    rows, passed = [], True
    settings = {"KVLOOM_URL": f"{url}/v1", "KVLOOM_MODEL": model, "KVLOOM_TOOL_CHOICE": args.tool_choice}
    for client in CLIENTS:
        if args.only and client.name not in args.only:
            continue
        try:
            found = problems(installed(client, args.cache.absolute()), settings)
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
    if args.url:
        rows, passed = attempt(args, args.url.rstrip("/"), args.model)
    else:
        flags = f"--served-model-name {NAME} --api-key {KEY} --port {{port}}"
        command = f"{sys.executable} -m kvloom.server.cli serve {args.model} {flags}"
        with tempfile.TemporaryDirectory() as logs, running(Server("kvloom", command), Path(logs)) as started:
            rows, passed = attempt(args, started.url, NAME)
    head = ["client", "version", *CASES]
    console.print(markdown(head, rows), markup=False, soft_wrap=True)
    if args.publish:
        note = f"Model: {Path(args.model).name}; tool_choice {args.tool_choice}. {describe()}."
        publish(args.publish, head, merged(args.publish, rows), note, command="make clients")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
