"""What a build makes: an sdist of real files, and of it wheels whose libraries a compiler for other machines has made.

The compiler is a stand-in for the package ziglang, which writes down what it was asked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kvloom.kernels.cpu.native.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
ZIG = """
import json, sys
words = sys.argv[1:]
with open(words[words.index("-o") + 1], "w") as made:
    json.dump(words, made)
"""
HOOK = "import sys; sys.path.insert(0, 'scripts'); import build_backend as made; print(made.{}, file=sys.stderr)"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: a compiler that can be started, and a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("packages")
    for name, file, text in (("ziglang", "__main__.py", ZIG), ("torch", "__init__.py", "raise ImportError('torch')")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        (folder / name / file).write_text(text)
    return folder


def hook(source: Path, packages: Path, call: str) -> subprocess.CompletedProcess[str]:
    """Call the back end in the folder of a source; what it returned, or died of, is the last line of stderr."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.run(
        [sys.executable, "-c", HOOK.format(call)], cwd=source, env=environment, capture_output=True, text=True, timeout=300
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Path:
    """The sdist, made of a copy of this checkout (building leaves folders behind), and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    keep_out = shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "__pycache__", ".*_cache", "tests", "results")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=keep_out)
    done = hook(folder / "source", packages, f"build_sdist({str(folder)!r})")
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / said(done)) as archive:
        assert all(member.isfile() or member.isdir() for member in archive), "no links"
        archive.extractall(folder, filter="data")
    return folder / said(done).removesuffix(".tar.gz")


def test_the_sdist_holds_what_a_wheel_is_built_of(unpacked: Path) -> None:
    for file in ("scripts/build_backend.py", "pyproject.toml", "LICENSE", "README.md", "kvloom/kernels/cpu/native/csrc/vec.h"):
        assert (unpacked / file).is_file(), file
    assert not (unpacked / "engine").exists() and not (unpacked / "tests").exists()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_holds_every_variant_of_its_machine(unpacked: Path, packages: Path, tmp_path: Path, machine: str) -> None:
    done = hook(unpacked, packages, f"build_wheel({str(tmp_path)!r}, {{'target': {machine!r}}})")
    assert done.returncode == 0, done.stderr
    name = said(done)
    assert name.endswith(f"-py3-none-manylinux_2_28_{machine}.whl")
    with zipfile.ZipFile(tmp_path / name) as wheel:
        libraries = {Path(file).name: json.loads(wheel.read(file)) for file in wheel.namelist() if file.endswith(".so")}
        assert {file.split("/")[0] for file in wheel.namelist() if ".dist-info" not in file} == {"kvloom"}
        (about,) = (file for file in wheel.namelist() if file.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in wheel.read(about).decode()
    assert set(libraries) == {one.file for one in VARIANTS if one.machine == machine}
    for words in libraries.values():
        assert words[words.index("-target") + 1] == f"{machine}-linux-gnu.2.28" and "-shared" in words
    assert not list((unpacked / "kvloom").rglob("*.so")), "a source stays as it was"
    shutil.rmtree(unpacked / "build")


def test_a_wheel_without_libraries_is_for_every_machine(unpacked: Path, packages: Path, tmp_path: Path) -> None:
    done = hook(unpacked, packages, f"build_wheel({str(tmp_path)!r}, {{'target': 'none'}})")
    assert said(done).endswith("-py3-none-any.whl"), done.stderr
    with zipfile.ZipFile(tmp_path / said(done)) as wheel:
        names = set(wheel.namelist())
    rooms = (
        "engine/core.py",
        "engine/cache/manager.py",
        "kernels/cpu/native/csrc/linear.cpp",
        "server/routes/chat.py",
        "py.typed",
    )
    assert {f"kvloom/{file}" for file in rooms} <= names and not any(name.endswith(".so") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kvloom"}


def test_what_a_build_needs(unpacked: Path, packages: Path, tmp_path: Path) -> None:
    asked = "get_requires_for_build_wheel({'target': %r})"
    assert "'ziglang==" in said(hook(unpacked, packages, asked % "aarch64"))
    assert said(hook(unpacked, packages, asked % "none")) == "[]"
    assert said(hook(unpacked, packages, asked % "sparc")) == "target is 'sparc'; allowed: x86_64, aarch64, none"
    (tmp_path / "torch").mkdir()
    without = hook(unpacked, tmp_path, f"build_wheel({str(tmp_path)!r}, {{'target': 'x86_64'}})")
    assert without.returncode and said(without).startswith("no package ziglang"), without.stderr
