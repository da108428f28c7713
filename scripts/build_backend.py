"""Builds the wheels: `python -m build`. All else (the sdist, editable installs) is setuptools' own.

A wheel for Linux holds the C++ library of every variant of its machine (`kernels/cpu/native/variants.py`), compiled by the
clang of the package ziglang, which also brings the C++ library and the glibc to link against: any machine makes any wheel, and
each runs from glibc 2.28 on. Neither torch nor a compiler of the system is needed.

    python -m build                              the sdist, and of it the wheel for this machine
    python -m build --wheel -C target=aarch64    the wheel for another: x86_64, aarch64
    python -m build --wheel -C target=none       a wheel without libraries, which are then built where it runs

Elsewhere than on Linux, with another libc or another machine, target is none.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]

NATIVE = Path("kvloom", "kernels", "cpu", "native")
COMPILER = "ziglang==0.17.1"
GLIBC = (2, 28)
TARGETS = ("x86_64", "aarch64", "none")
Settings = Mapping[str, Any] | None

_target = "none"
"""Of the wheel that is being built: setuptools makes the commands below, and tells them nothing."""


def target_of(settings: Settings) -> str:
    """The machine that a wheel is for, or none. Raises SystemExit for a name that is no target."""
    here = platform.machine() if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else "none"
    asked = (settings or {}).get("target", here if here in TARGETS else "none")
    if asked not in TARGETS:
        raise SystemExit(f"target is {asked!r}; allowed: {', '.join(TARGETS)}")
    return str(asked)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """The compiler, where there is something to compile."""
    return [] if target_of(config_settings) == "none" else [COMPILER]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the wheel; returns its file's name."""
    global _target
    _target = target_of(config_settings)
    return build_meta.build_wheel(wheel_directory)


class BuildModules(build_py):
    """The modules, and the libraries beside them."""

    def run(self) -> None:
        """Copy the modules; compile."""
        super().run()
        if _target != "none" and not self.editable_mode:
            compile_variants(_target, Path(self.build_lib) / NATIVE / "prebuilt")


class BuildWheel(bdist_wheel):
    """A wheel for one kind of machine and every Python, since the libraries know nothing of Python."""

    def finalize_options(self) -> None:
        """Tell setuptools that this is none of pure Python."""
        if _target != "none":
            self.distribution.has_ext_modules = lambda: True  # so that the files lie where libraries may
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Of its file's name."""
        return super().get_tag() if _target == "none" else ("py3", "none", f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{_target}")


def compile_variants(machine: str, folder: Path) -> None:
    """Compile every variant of a machine into a folder. Raises SystemExit where it cannot be."""
    compiler, variants = _module("compiler"), _module("variants")
    command = compiler.zig()
    if command is None:
        raise SystemExit(f"no package ziglang, which compiles the kernels: pip install {COMPILER}, or give -C target=none")
    folder.mkdir(parents=True, exist_ok=True)
    command += ["-target", f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"]
    for one in variants.VARIANTS:
        if one.machine == machine:
            print(f"compiling {one.file}", flush=True)
            flags = [*compiler.COMMON_FLAGS, *compiler.spelled(one.flags, command)]
            compiler.compile_library(command, flags, folder / one.file, link=["-s"])


def _module(name: str) -> ModuleType:
    """A module of the native back end that imports nothing that wants torch, as the rest of the package does."""
    package = sys.modules.setdefault("kvloom_native", ModuleType("kvloom_native"))
    package.__path__ = [str(NATIVE)]
    return importlib.import_module(f"kvloom_native.{name}")
