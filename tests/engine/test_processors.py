"""Cores that affinity and control groups leave, and the threads that follow."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from kvloom.engine.startup.processors import Processors, processors, quota


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"cpu.{name}").write_text(text + "\n")


def test_version_2_takes_the_least_of_the_group_and_those_around_it(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/pod/kvloom\n")
    _group(tmp_path / "fs")
    assert quota(tmp_path / "self", tmp_path / "fs") == math.inf, "nothing there"
    _group(tmp_path / "fs" / "pod" / "kvloom", max="max 100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == math.inf
    _group(tmp_path / "fs" / "pod", max="150000 100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == 1.5
    _group(tmp_path / "fs" / "pod" / "kvloom", max="50000 100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == 0.5


def test_version_1_and_a_container_that_sees_only_its_own_root(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("4:memory:/docker/abc\n2:cpuacct:/docker/abc\n1:cpu,cpuacct:/docker/abc\n")
    _group(tmp_path / "fs" / "cpu", cfs_quota_us="-1", cfs_period_us="100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == math.inf
    _group(tmp_path / "fs" / "cpu", cfs_quota_us="250000", cfs_period_us="100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == 2.5


def test_other_places_where_systems_mount_them(tmp_path: Path) -> None:
    (tmp_path / "self").write_bytes(b"1:cpu,cpuacct:/a\n0::/b\xff\n")
    _group(tmp_path / "fs" / "cpu,cpuacct" / "a", cfs_quota_us="300000", cfs_period_us="100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == 3
    _group(tmp_path / "fs" / "unified" / "b\udcff", max="200000 100000")
    assert quota(tmp_path / "self", tmp_path / "fs") == 2


@pytest.mark.parametrize("text", ["", "nonsense", "100000 0", "1 2 3", "1" + 400 * "0" + " 1"])
def test_files_that_make_no_sense_grant_everything(tmp_path: Path, text: str) -> None:
    (tmp_path / "self").write_text("0::/../..\n0::/\nx\n")
    _group(tmp_path / "fs", max=text)
    assert quota(tmp_path / "self", tmp_path / "fs") == math.inf
    assert quota(tmp_path / "absent", tmp_path / "fs") == math.inf


@pytest.mark.parametrize(
    ("cores", "granted", "threads"), [(2, math.inf, 2), (2, 1.5, 1), (2, 1.0, 1), (8, 2.9, 2), (2, 0.1, 1), (4, 16.0, 4)]
)
def test_no_more_threads_than_the_quota_feeds_all_the_time(cores: int, granted: float, threads: int) -> None:
    assert Processors(cores, granted).threads == threads


def test_what_is_said_of_them() -> None:
    assert str(Processors(2)) == "2 cores" and str(Processors(1, 4.0)) == "1 core"
    assert str(Processors(2, 1.5)) == "2 cores, of which the control group grants 1.5"


def test_this_process() -> None:
    assert 1 <= processors().threads <= processors().cores == len(os.sched_getaffinity(0))
