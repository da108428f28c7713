"""Build the wheels and use one where there is no compiler: `python scripts/check_wheels.py`.

    build      the sdist, of it the wheel for this machine, and the wheel for the other one (python -m build)
    install    the wheel into an empty environment, torch first, as scripts/install.py would
    serve      the built-in model there, without a compiler on the path: healthy, a chat answered, stopped; then again, with the
               network behind a proxy that is not there
    variants   every library that this processor can run: the same greedy tokens; every other one is refused

Exits with 1 at the first thing that is not so. --publish writes sizes and seconds into docs/figures/package.json. --dist FOLDER
takes the wheels that lie there instead of building.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvloom.kernels.cpu.native.variants import VARIANTS, missing, processor_flags
from kvloom.loadtest import figures

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc", "zig")
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""A port that nothing listens on."""
QUESTION = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
LOGPROBS = """
import json
from kvloom import LLM, SamplingParams
llm = LLM("smollm2", device="cpu", threads=1, kv_memory="64MiB")
prompts = ["The capital of France is", "Once upon a time there was a", "Water boils at"]
given = SamplingParams(max_tokens=16, temperature=0, logprobs=0)
outputs = llm.generate(prompts, given)
print(json.dumps({"build": llm.model.build, "tokens": [token for one in outputs for token in one.tokens],
                  "logprobs": [token.logprob for one in outputs for token in one.logprobs]}))
"""
TOLERANCE = 0.05
"""Of a log-probability: sums in another order, rounded to bf16 in every layer."""


class CheckError(Exception):
    """What is not as it should be."""


def say(text: str) -> None:
    """A line at once."""
    print(f"check: {text}", flush=True)


def timed(command: list[str], **how: Any) -> float:
    """Seconds that a command took. Raises CheckError with the end of its output if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **how)
    if done.returncode:
        raise CheckError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - began


def build(dist: Path) -> dict[str, float]:
    """Seconds by what was built, each in an environment of its own, downloads included."""
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    make = [sys.executable, "-m", "build", "--outdir", str(dist)]
    spent = {platform.machine(): timed([*make, str(ROOT)])}
    return spent | {other: timed([*make, "--wheel", "-C", f"target={other}", str(ROOT)])}


def install(folder: Path, wheel: Path) -> float:
    """Seconds that the wheel and all it needs but torch take, in a new environment."""
    venv.create(folder, with_pip=True)
    python, apart = str(folder / "bin" / "python"), {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    torch = "import sys; sys.path.insert(0, 'scripts'); import install; sys.exit(install.install_torch())"
    timed([python, "-c", torch], cwd=ROOT, env=apart)
    return timed([python, "-m", "pip", "install", str(wheel)], cwd=folder, env=apart)


def bare(environment: Path) -> dict[str, str]:
    """The variables of a process in there that finds no compiler, no checkout, and a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "KVLOOM_NATIVE")}
    found = {name for name in COMPILERS if shutil.which(name, path=str(environment / "bin"))}
    if found:
        raise CheckError(f"the environment has compilers: {found}")
    return {**kept, "PATH": str(environment / "bin"), "KVLOOM_CACHE": str(environment / "cache")}


@contextlib.contextmanager
def server(environment: Path, variables: dict[str, str]) -> Iterator[tuple[str, float]]:
    """A server's address, and seconds from its start until it was healthy; stopped afterwards. Raises CheckError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, began = environment / "server.log", time.perf_counter()
    command = [str(environment / "bin" / "kvloom"), "serve", "smollm2", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=variables, cwd=environment, stdout=out, stderr=out)
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.perf_counter() - began > 300:
                raise CheckError(f"the server does not become healthy:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", time.perf_counter() - began
    finally:
        process.terminate()
        code = process.wait(timeout=60)
    if code:
        raise CheckError(f"the server ended with {code}:\n{log.read_text()[-2000:]}")


def serve(environment: Path, variables: dict[str, str]) -> float:
    """Seconds until it was healthy. Raises CheckError if it does not answer, or without ready-made native kernels."""
    with server(environment, variables) as (url, seconds):
        asked = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        model = next(line for line in (environment / "server.log").read_text().splitlines() if line.startswith("  model "))
    if "Tokyo" not in said or "ready-made" not in model:
        raise CheckError(f"answered {said!r}, with {model.strip()}")
    say(f"healthy in {seconds:.1f} s, {model.strip()}: {said}")
    return seconds


def variants(environment: Path, variables: dict[str, str]) -> None:
    """Raises CheckError if a library answers otherwise than the best one, or one that cannot run here is not refused."""
    python, flags, answers = str(environment / "bin" / "python"), processor_flags(), list[dict[str, Any]]()
    for one in VARIANTS:
        command, named = [python, "-c", LOGPROBS], {**variables, "KVLOOM_NATIVE": one.name}
        done = subprocess.run(command, env=named, cwd=environment, capture_output=True, text=True, check=False)
        if lacks := missing(one, flags):
            if f"KVLOOM_NATIVE is '{one.name}': this machine lacks" not in done.stderr or not done.returncode:
                raise CheckError(f"{one.name} lacks {lacks} and is not refused:\n{done.stderr[-2000:]}")
            say(f"{one.name} is refused: {done.stderr.strip().splitlines()[-1]}")
            continue
        if done.returncode:
            raise CheckError(f"{one.name} fails:\n{done.stderr[-2000:]}")
        answers.append(json.loads(done.stdout.splitlines()[-1]))
        best, this = answers[0], answers[-1]
        apart = max(abs(a - b) for a, b in zip(best["logprobs"], this["logprobs"], strict=True))
        if this["tokens"] != best["tokens"] or apart > TOLERANCE:
            raise CheckError(f"{one.name} answers otherwise, log-probabilities up to {apart:.4f} apart: {answers}")
        say(f"{this['build']}: the same {len(this['tokens'])} tokens, log-probabilities within {apart:.4f}")


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def check(work: Path, dist: Path | None) -> list[tuple[str, float | None, float | None]]:
    """What was measured: (what, bytes, seconds)."""
    rows: list[tuple[str, float | None, float | None]] = []
    built = build(dist := work / "dist") if dist is None else {}
    (sdist,) = dist.glob("*.tar.gz")
    rows.append(("sdist", size(sdist), None))
    for wheel in sorted(dist.glob("*.whl"), reverse=True):
        machine = wheel.stem.partition("_2_28_")[2]
        rows.append((f"wheel for {machine}, built", size(wheel), built.get(machine)))
    (wheel,) = dist.glob(f"*{platform.machine()}.whl")
    say(f"{wheel.name}: {size(wheel):,} bytes")
    environment = work / "environment"
    seconds = install(environment, wheel)
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    rows += [("kvloom, installed with all but torch", size(packages / "kvloom"), seconds)]
    rows += [("torch", size(packages / "torch"), None), ("all packages", size(packages), None)]
    variables = bare(environment)
    rows.append(("first start until healthy, the model fetched", None, serve(environment, variables)))
    rows.append(("second start, offline", None, serve(environment, {**variables, **OFFLINE})))
    if (environment / "cache" / "native").exists():
        raise CheckError("a library was built, though one came ready-made")
    variants(environment, {**variables, **OFFLINE})
    return rows


def main() -> int:
    """Check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dist", type=Path, help="the folder with the sdist and the wheels (default: build them)")
    parser.add_argument("--publish", action="store_true", help="write docs/figures/package.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvloom-wheels-") as work:
        try:
            rows = check(Path(work), args.dist and args.dist.resolve())
        except CheckError as error:
            say(str(error))
            return 1
    head = ["", "MB", "seconds"]
    cells = [
        [what, "" if held is None else f"{held / 1e6:,.1f}", "" if spent is None else f"{spent:.1f}"]
        for what, held, spent in rows
    ]
    print(figures.markdown(head, cells))
    if args.publish:
        command = "python scripts/check_wheels.py --publish"
        figures.publish(ROOT / figures.FOLDER / "package.json", head, cells, command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
