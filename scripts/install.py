"""Installs kvloom, editable, into the environment that runs this script: `python scripts/install.py [EXTRA ...]`.

With --fixed it is copied, not editable, as images need it; with --only-torch nothing but torch is installed.

torch comes first and alone, from PyTorch's index of CPU builds: on Linux the main index serves CUDA's, 2.7 GB with their
libraries. The environment variable TORCH_INDEX names another index, or a folder of wheels; empty means what pip is configured
for (CUDA's build, on a plain machine). If the index does not answer within seconds, pip's own configuration is used, and a
line says so. Everything else comes from wherever pip is configured to look.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 5
"""How long an index may take to answer."""


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    print(f"install: {text}", flush=True)


def pip(*arguments: str) -> int:
    """pip's exit code."""
    return subprocess.run([sys.executable, "-m", "pip", "install", "--progress-bar=on", *arguments], check=False).returncode


def torch_pin() -> str:
    """The requirement of torch, as pyproject.toml has it."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted: list[str] = tomllib.load(file)["project"]["dependencies"]
    return next(line for line in wanted if re.match(r"torch\b", line))


def installed(requirement: str) -> bool:
    """Whether this environment has it, in any build of that version."""
    name, _, version = requirement.partition("==")
    try:
        return importlib.metadata.version(name).split("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        return False


def source(index: str) -> list[str] | None:
    """pip's flags for an index or a folder of wheels; None if it does not answer."""
    if Path(index).is_dir():
        return ["--no-index", "--find-links", index]
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=SECONDS):
            return ["--index-url", index]
    except (OSError, ValueError) as error:  # no network, no such host, a 404, no URL at all
        say(f"{index} does not answer ({error}): torch comes from where pip is configured to look, which may be CUDA's build")
        return None


def install_torch() -> int:
    """torch, unless it is there. Returns pip's exit code."""
    wanted, index = torch_pin(), os.environ.get("TORCH_INDEX", CPU_INDEX if sys.platform == "linux" else "")
    if installed(wanted):
        return 0
    flags = source(index) if index else None
    if flags is None:
        return pip(wanted)
    say(f"torch's build for CPUs, about 200 MB, from {index} (TORCH_INDEX= for pip's own)")
    return pip("--no-deps", *flags, wanted)


def main(words: list[str]) -> int:
    """Returns the exit code."""
    extras = [word for word in words if not word.startswith("--")]
    code = install_torch()
    if code or "--only-torch" in words:
        return code
    what = f".[{','.join(extras)}]" if extras else "."
    say(f"kvloom and what it needs{', with ' + ', '.join(extras) if extras else ''}")
    return pip(*([] if "--fixed" in words else ["--editable"]), str(ROOT) + what[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
