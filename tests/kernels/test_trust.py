"""Compiled code is loaded only from where nobody else may put it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from kvloom.engine.calibration import store
from kvloom.kernels import trust
from kvloom.kernels.cpu.native import library
from kvloom.kernels.trust import code_folder, foreign

build = importlib.import_module("kvloom.kernels.cpu.native.build")  # the package has a function of that name
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of one's own."""
    trust._private.cache_clear()
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o722])
@pytest.mark.parametrize("where", ["cache", "cache/native"])
def test_a_folder_that_others_write_to_is_not_used(
    tmp_path: Path, mode: int, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = code_folder(tmp_path / "cache" / "native")
    assert folder == tmp_path / "cache" / "native"
    (tmp_path / where).chmod(mode)
    with caplog.at_level(logging.WARNING):
        private = build.cache_folder()
    assert private != folder and foreign(private) is None and private.stat().st_mode & 0o077 == 0
    assert "can be written by other users" in caplog.text and "KVLOOM_CACHE" in caplog.text
    assert build.cache_folder() == private, "one for this process"
    (tmp_path / where).chmod(0o755)
    assert build.cache_folder() == folder


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_write_to_is_not_used(cache: Path, mode: int) -> None:
    folder = code_folder(cache / "native" / "x")
    planted = folder / "a" / "kernel.nbc"
    planted.parent.mkdir()
    planted.parent.chmod(0o755)
    planted.write_bytes(b"code")
    planted.chmod(0o644)
    assert code_folder(folder) == folder
    planted.chmod(mode)
    assert code_folder(folder) != folder
    folder.chmod(0o700)
    assert code_folder(folder) == folder, "nobody else reaches the file"


@AS_ROOT
@pytest.mark.parametrize("where", ["cache", "cache/native", "cache/native/kvloom-x.so"])
def test_what_another_user_owns_is_not_used(cache: Path, where: str) -> None:
    folder = code_folder(cache / "native")
    (folder / "kvloom-x.so").write_bytes(b"code")
    (folder / "kvloom-x.so").chmod(0o755)
    assert code_folder(folder) == folder
    os.chown(cache.parent / where, 12345, 12345)
    assert code_folder(folder) != folder
    assert "another user" in str(foreign(folder / "kvloom-x.so"))


def test_links_are_followed(cache: Path, tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    cache.mkdir(mode=0o755)
    (cache / "native").symlink_to(open_folder)
    assert code_folder(cache / "native") not in (cache / "native", open_folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o755), (0o002, 0o700), (0o000, 0o700)])
def test_folders_are_made_for_their_owner_alone_to_write_to(cache: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        assert code_folder(cache / "a" / "b") == cache / "a" / "b"
        assert os.umask(umask) == umask
        (cache / "a" / "b" / "x").write_bytes(b"")
        assert code_folder(cache / "a" / "b") == cache / "a" / "b"
    finally:
        os.umask(before)
    assert [(cache / part).stat().st_mode & 0o777 for part in ("", "a", "a/b")] == [mode] * 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_library_that_others_write_to_is_neither_loaded_nor_trusted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def compile_(compiler: list[str], flags: list[str], target: Path, *_: object) -> None:
        target.write_bytes(b"library")
        target.chmod(0o755)
        made.append(target)

    monkeypatch.setattr(build, "compile_library", compile_)
    target = build.build().path
    assert build.build().path == target and made == [target]
    target.chmod(0o777)
    assert not build._usable(target)
    again = build.build().path
    assert made == [target, again] and again != target
    with pytest.raises(build.NativeUnavailable, match="can be written by other users"):
        library.Library(target)


@AS_ROOT
def test_calibrations_that_this_user_may_not_see_are_skipped(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.write("razor", "some model", {"a": 1})
    cache.chmod(0o700)
    user = os.geteuid()
    os.seteuid(12345)
    try:
        assert store.read("razor", "some model") is None
    finally:
        os.seteuid(user)
    assert "Permission denied" in caplog.text and "KVLOOM_CACHE" in caplog.text
    assert store.read("razor", "some model") is not None


def test_a_calibration_that_others_write_to_is_skipped(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    code_folder(cache / "calibrations")
    path = store.write("razor", "some model", {"a": 1})
    path.chmod(0o644)
    assert store.read("razor", "some model") == {"a": 1, "model_key": "some model"}
    path.write_text(json.dumps({"a": 2, "model_key": "some model"}))
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        assert store.read("razor", "some model") is None
    assert "can be written by other users" in caplog.text
