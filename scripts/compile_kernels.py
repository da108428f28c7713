"""Compile every Triton kernel ahead of time, here or with another version of Triton. No GPU is needed.

    python scripts/compile_kernels.py                   and write the tables into docs/figures
    python scripts/compile_kernels.py --triton 3.9.0    the same with that version, which goes into an environment that has all
                                                        else from the one that runs this; under names that end with it
    python scripts/compile_kernels.py --folder DIR      keeps the environment and what was compiled there: the next run goes on
                                                        where this one was ended
    python scripts/compile_kernels.py --only NAME       makes one of the tables
    python scripts/compile_kernels.py --kinds A,B       sweeps these kinds of attention alone: decode, lists, chunk, list
                                                        chunk, score

Exits with 1 if a kernel spills registers or wants more shared memory than a program may have.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES: dict[str, list[str]] = {"gpu-kernels": [], "gpu-attention": ["--sweep"]}
"""Result files, and what makes them of `kvloom.kernels.triton.compiled`."""


def compiled(python: str, flags: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code, and the table as Markdown."""
    words = [python, "-m", "kvloom.kernels.triton.compiled", *flags]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def publish(name: str, table: str, version: str, command: str) -> None:
    """Write a table as a result file."""
    from kvloom.loadtest import figures

    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    where = f"{datetime.date.today()}, triton {version}, no GPU"
    figures.publish(ROOT / figures.FOLDER / f"{name}.json", head, rows, command=command, machine=where)


def other(folder: str, version: str) -> str:
    """The Python of an environment in `folder` with that version of Triton, and everything that this one has."""
    python = str(Path(folder) / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"triton=={version}"], check=True)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind what the environment has itself
    return python


def main() -> int:
    """Compile, then print or publish; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--triton", metavar="VERSION", help="install this version and use it (default: what is here)")
    parser.add_argument("--folder", metavar="DIR", help="where that is, and what was compiled is kept (default: nowhere)")
    parser.add_argument("--only", choices=tuple(TABLES), help="the table to make (default: all)")
    parser.add_argument("--kinds", metavar="A,B", help="of attention that are swept (default: all)")
    args = parser.parse_args()
    version, code = args.triton, 0
    with tempfile.TemporaryDirectory() as passing:
        folder = args.folder or passing
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        if version or args.folder:
            environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        python = other(folder, version) if version else sys.executable
        asked = [python, "-c", "import triton; print(triton.__version__)"]
        there = subprocess.run(asked, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        print(f"triton {there}", flush=True)
        for name in [args.only] if args.only else TABLES:
            kinds = [args.kinds] if args.kinds and "--sweep" in TABLES[name] else []
            failed, table = compiled(python, [*TABLES[name], *kinds], environment)
            if not failed:
                end, flag = (f"-{version.replace('.', '-')}", f" --triton {version}") if version else ("", "")
                chosen = f" --kinds '{args.kinds}'" if kinds else ""
                publish(name + end, table, there, f"python scripts/compile_kernels.py{flag}{chosen}")
            code |= failed
    return code


if __name__ == "__main__":
    sys.exit(main())
