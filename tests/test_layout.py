"""The rooms of the house: imports point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine", "version"},
    "loadtest": {"loadtest", "server", "engine", "kernels", "version"},
    "deploy": {"deploy", "loadtest", "server", "engine", "version"},
}
RAY = {"router", "replica", "client", "fleet", "local", "scaling", "app", "check"}
"""Modules of `deploy/` that may import Ray."""


FLOORS = (
    {"errors", "bounds"},
    {"device"},
    {"settings"},
    {"config"},
    {"model"},
    {"text", "calibration"},
    {"constraint"},
    {"cache"},
    {"requests"},
    {"client"},
    {"retention"},
    {"selection"},
    {"reuse"},
    {"scheduling"},
    {"step"},
    {"statistics"},
    {"core"},
    {"startup"},
    {"llm", "thread"},
)
"""Rooms of `engine/`, from the ground up: a room imports what is below it, and its own files; never in a circle."""


def imports(path: Path) -> set[str]:
    """Rooms of kvloom that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "kvloom" else {node.module}
    return {name.split(".")[1] for name in found if name.startswith("kvloom.")}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        extra = imports(path) - MAY_IMPORT[room] - {"__version__"}
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def modules(folder: Path) -> dict[str, set[str]]:
    """Of every module of a folder of kvloom, those that it imports, for type checking and inside functions too."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in folder.rglob("*.py")}
    files = {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvloom."):
                module = node.module.removeprefix("kvloom.")
                parts = {f"{module}.{alias.name}" for alias in node.names}
                found[name] |= {part if part in files else module for part in parts} & files.keys() - {name}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), len(FLOORS))


def arrows(found: dict[str, set[str]]) -> list[str]:
    """Imports of one room of `engine/` by another that is not above it."""
    pairs = [(name, other) for name, others in found.items() for other in others if room(name) != room(other)]
    return sorted(f"{name} -> {other}" for name, other in pairs if floor(name) <= floor(other))


def circles(found: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or through others."""
    reach = {name: set(others) for name, others in found.items()}
    for middle in reach:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    together = {name: frozenset(other for other in others if name in reach[other]) for name, others in reach.items()}
    return [set(group) for group in sorted(set(together.values()), key=len) if group]


def test_arrows_inside_the_engine_point_down() -> None:
    found = modules(ROOT / "engine")
    assert len(found) > 100
    up = arrows(found)
    print(f"{sum(map(len, found.values()))} imports between {len(found)} modules, {len(up)} of them not downwards")
    assert not up
    assert not circles(found)
    assert {room(name) for name in found} - {""} == set().union(*FLOORS), "a room has no floor, or a floor no room"


def test_arrows_and_circles_are_seen() -> None:
    found = {
        "engine.core": {"engine.cache.pool"},
        "engine.cache.pool": {"engine.step.run"},
        "engine.step.run": {"engine.core"},
    }
    assert arrows(found) == ["engine.cache.pool -> engine.step.run", "engine.step.run -> engine.core"]
    assert circles(found) == [set(found)]


def test_the_readers_path_leads_to_files_and_is_as_long_as_it_says() -> None:
    page = (ROOT / "docs" / "engine.md").read_text().split("## Reading the code")[1]
    said = int(re.findall(r"About ([\d,]+) lines", page)[0].replace(",", ""))
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE))
    assert abs(lines - said) < 150


def test_every_room_is_linked() -> None:
    for room in MAY_IMPORT:
        link = ROOT / "kvloom" / room
        assert link.is_symlink() and link.resolve() == ROOT / room


def test_the_serving_path_imports_neither_transformers_nor_ray() -> None:
    code = "import sys, kvloom.engine.thread.client, kvloom.server.app, kvloom.server.serve; "
    code += (
        "found = {'transformers', 'ray'} & {name.split('.')[0] for name in sys.modules}; sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ray_is_imported_by_modules_of_deploy_alone() -> None:
    found = set()
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {str(path.relative_to(ROOT)) for name in names if name.split(".")[0] == "ray"}
    assert "deploy/router.py" in found
    assert found <= {f"deploy/{name}.py" for name in RAY}
