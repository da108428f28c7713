"""python -m kvloom.loadtest.fuzz.api [--examples N] [--seed S]: schemathesis over /openapi.json, against a served process.

It makes requests from the description, right ones and wrong ones, and looks at the answers: no 500, no status and no form
that is not described, no request without an answer. Afterwards nothing runs, no block is lost, and the engine's books
balance. A random model of two layers is served, so that what takes time is the API. schemathesis is pinned and lives in an
environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvloom.loadtest.bench.soak import Target, forgotten, settled
from kvloom.loadtest.client.servers import Server, StartError, running
from kvloom.loadtest.clients.__main__ import InstallError, installed
from kvloom.loadtest.clients.clients import Client
from kvloom.loadtest.fuzz.engines import write_model
from kvloom.loadtest.study.flags import FAILED, BenchError, add, complain

SCHEMATHESIS = Client("schemathesis", ("schemathesis==4.32.5",), "")
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "unsupported_method", "allow_header_conformance")  # fmt: skip
"""Without those that want every unknown field refused, and every generated request accepted."""
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ANSWER_SECONDS = 60
"""In which every request has its answer, or hangs."""
SERVER = ("--kv-memory 1MiB --max-num-seqs 16 --max-queued-tokens 4000 --no-access-log --reuse approx "
          "--kvshare-options '{\"verified\": true, \"min_match\": 32}'")  # fmt: skip


def fuzz(url: str, python: Path, folder: Path, examples: int, seed: int) -> int:
    """Run schemathesis; returns its exit code. folder: for what it keeps, beside what it prints."""
    command = [str(python.with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--phases",
               "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", str(seed), "--request-timeout",
               str(ANSWER_SECONDS), "--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"]  # fmt: skip
    return subprocess.run(command, check=False, cwd=folder).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if something did not hold."""
    made = argparse.ArgumentParser(prog="python -m kvloom.loadtest.fuzz.api", description=(__doc__ or "").split("\n")[0])
    add(made, ("examples", 100, "requests made of each operation"))
    made.add_argument("--seed", type=int, help="of the requests; default: another each time, which schemathesis prints")
    cache = Path("build/clients")
    made.add_argument("--cache", type=Path, default=cache, help="where schemathesis is installed (default: %(default)s)")
    args = made.parse_args(argv)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    try:
        python = Path(installed(SCHEMATHESIS, args.cache.absolute())[0])
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder))
            template = Path(folder) / "template.jinja"
            template.write_text(TEMPLATE)
            served = f"{sys.executable} -m kvloom.server.cli serve {folder} --port {{port}} --chat-template {template} {SERVER}"
            with running(Server("api", served), Path(folder)) as started:
                assert started.pid is not None
                code = fuzz(started.url, python, Path(folder), args.examples, seed)
                target = Target(started.url, started.pid)
                _, lost = asyncio.run(settled(target))
                lost += asyncio.run(forgotten(target))
    except (StartError, BenchError, InstallError) as error:
        return complain(error, FAILED)
    if lost:
        return complain(f"{lost} blocks are lost", FAILED)
    return FAILED if code else 0


if __name__ == "__main__":
    sys.exit(main())
