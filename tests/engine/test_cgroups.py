"""Limits of control groups, of both versions, in whatever layout systems mount them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.engine.startup.cgroups import free_memory, granted_cores

MIB = 1 << 20
LIMITS = [granted_cores, free_memory]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def processes(root: Path, text: str) -> None:
    (root / "proc/self/cgroup").write_bytes(text.encode("utf-8", "surrogateescape"))


def group(root: Path, place: str, files: dict[str, object]) -> None:
    folder = root / "sys/fs/cgroup" / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def cpu2(quota: object, period: int = 100_000) -> dict[str, object]:
    return {"cpu.max": f"{quota} {period}"}


def cpu1(quota: int, period: int = 100_000) -> dict[str, object]:
    return {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}


def memory2(limit: object, used: object, stat: str = "") -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def memory1(limit: object, used: object, stat: str = "") -> dict[str, object]:
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_version_2_takes_the_least_of_the_group_and_those_around_it(root: Path) -> None:
    processes(root, "0::/pod/kvloom\n")
    assert granted_cores(root) == free_memory(root) == math.inf, "nothing there"
    group(root, "pod/kvloom", cpu2("max") | memory2("max", 10 * MIB))
    assert granted_cores(root) == free_memory(root) == math.inf
    group(root, "pod", cpu2(150_000) | memory2(100 * MIB, 60 * MIB))
    assert (granted_cores(root), free_memory(root)) == (1.5, 40 * MIB)
    group(root, "pod/kvloom", cpu2(25_000, 50_000) | memory2(90 * MIB, 30 * MIB))
    assert (granted_cores(root), free_memory(root)) == (0.5, 40 * MIB), "of memory, the group around it has less left"
    group(root, "pod/neighbour", cpu2(1000) | memory2(MIB, MIB))
    assert (granted_cores(root), free_memory(root)) == (0.5, 40 * MIB), "others' limits are theirs"


def test_version_1_and_a_container_that_sees_only_its_own_root(root: Path) -> None:
    processes(root, "4:memory:/docker/abc\n2:cpuacct:/docker/abc\n1:cpu,cpuacct:/docker/abc\n")
    group(root, "cpu", cpu1(-1))
    group(root, "memory", memory1(9_223_372_036_854_771_712, 5 * MIB))
    assert granted_cores(root) == math.inf and free_memory(root) > 1 << 60
    group(root, "cpu", cpu1(250_000))
    group(root, "memory", memory1(100 * MIB, 70 * MIB, f"active_file {99 * MIB}\ntotal_active_file {MIB}"))
    assert (granted_cores(root), free_memory(root)) == (2.5, 31 * MIB)
    group(root, "memory/docker", memory1(50 * MIB, 45 * MIB))
    assert free_memory(root) == 5 * MIB


def test_systems_that_mount_both_versions_elsewhere(root: Path) -> None:
    processes(root, "9:memory:/a\n1:cpu,cpuacct:/a\n0::/b\udcff\n")
    group(root, "cpu,cpuacct/a", cpu1(300_000))
    group(root, "memory/a", memory1(64 * MIB, 0))
    assert (granted_cores(root), free_memory(root)) == (3, 64 * MIB)
    group(root, "unified/b\udcff", cpu2(200_000) | memory2(32 * MIB, 0))
    assert (granted_cores(root), free_memory(root)) == (2, 32 * MIB)


def test_cached_files_make_room_when_it_is_wanted(root: Path) -> None:
    processes(root, "0::/\n")
    group(root, "", memory2(3000, 1000))
    assert free_memory(root) == 2000
    group(root, "", memory2(3000, 1000, "active_file 300\ninactive_file 200\nslab 999\n"))
    assert free_memory(root) == 2500
    group(root, "", memory2(3000, 1000, "active_file 2000\n"))
    assert free_memory(root) == 3000, "never more than the limit"
    group(root, "", memory2(3000, 4000))
    assert free_memory(root) == 0


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "text", ["", "nonsense", "100000 0", "-5 100000", "-5", "1 2 3", "1" + 5000 * "0" + " 1", "max", "\x00"]
)
def test_files_that_make_no_sense_limit_nothing(root: Path, limit: Callable[[Path], float], text: str) -> None:
    processes(root, "0::/../..\n0::/\nx\n:::\n1:cpu:/\n2:memory:/\n")
    for place in ("", "cpu", "memory"):
        names = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.max", "memory.limit_in_bytes")
        group(root, place, {**dict.fromkeys(names, text), "memory.current": 1, "memory.usage_in_bytes": 1})
    assert limit(root) == math.inf
    group(root, "", memory2(3000, 1000, text))
    assert free_memory(root) == 2000, "a list of what is in memory that makes no sense leaves the limit"


@pytest.mark.parametrize("limit", LIMITS)
def test_a_system_without_control_groups(root: Path, limit: Callable[[Path], float]) -> None:
    assert limit(root) == math.inf
    assert limit(root / "absent") == math.inf
    (root / "proc/self/cgroup").mkdir()
    assert limit(root) == math.inf


@pytest.mark.parametrize("limit", LIMITS)
def test_this_process(limit: Callable[[], float]) -> None:
    assert limit() > 0
