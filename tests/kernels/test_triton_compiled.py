"""Every Triton kernel, compiled for two architectures without a GPU, in a process of its own: others run the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")


def run(program: str) -> Any:
    """What a program prints as JSON, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


TABLE = """
import json
from kvloom.kernels.triton import compiled
built = compiled.every()
print(json.dumps({"problems": list(compiled.problems(built)), "built": [
    {**one._asdict(), "ptx": None, "wide": one.wide_loads, "multiplies": one.tensor_cores, "occupancy": one.occupancy,
     "copies": one.ptx.count("cp.async.cg.shared.global")} for one in built]}))
"""


def test_kernels_compile_without_spilling() -> None:
    found = run(TABLE)
    assert not found["problems"]
    assert {one["arch"] for one in found["built"]} == {80, 90}
    assert all(0 < one["occupancy"] <= 1 for one in found["built"])
    for one in found["built"]:
        if one["call"] in ("decode", "lists", "chunk", "list chunk", "score") and one["kernel"] == "attend":
            assert one["multiplies"] == ("wgmma" if "chunk" in one["call"] and one["arch"] == 90 else "mma")
            assert one["copies"], f"keys are not copied 16 bytes at once: {one}"
    moved = {"attend", "merge", "fold_sections", "_store", "_rotate", "_rotate_store", "_add_rms_norm", "_silu_mul", "linear",
             "_sum_up", "_pool", "_select"}  # fmt: skip
    assert {one["kernel"] for one in found["built"] if one["wide"]} >= moved


SAMPLE = """
import json
from kvloom.kernels.triton import compiled
some = [("list chunk", "fp32", 80, 7), ("chunk", "bf16", 96, 3), ("lists", "fp16", 256, 8), ("score", "fp32", 256, 1)]
built = compiled.sweep([compiled.Geometry(*one) for one in some])
spilling = built[0]._replace(spilled=8, shared=1 << 20)
print(json.dumps([list(compiled.problems(built)), len(built), list(compiled.problems([spilling]))]))
"""


def test_a_sample_of_all_geometries_compiles_without_spilling() -> None:
    problems, count, made_up = run(SAMPLE)
    assert not problems and count == 14
    assert "spills 8 bytes" in made_up[0] and "wants 1048576 bytes" in made_up[1]


VARIANTS = """
import collections, json
from kvloom.kernels.triton import calls
from kvloom.kernels.triton.ahead import recorded, variant
found = collections.defaultdict(set)
for name, call in calls.CALLS.items():
    for rows in (1, 7, 16, 33):
        with recorded() as launches:
            call(rows)
        for launch in launches:
            chosen = [launch.options.get(option) for option in ("TILE", "SPREAD", "SEGMENT")]
            chosen.append("first" in launch.options and launch.options["first"] is None)  # all rows alone, or tiles
            found[name, launch.kernel.__name__, *chosen].add(variant(launch, 90))
print(json.dumps([[str(key), len(variants)] for key, variants in found.items()]))
"""


def test_no_number_of_rows_is_compiled_for() -> None:
    """1 and multiples of 16 are numbers for which Triton compiles anew unless told not to."""
    found = dict(run(VARIANTS))
    assert len(found) > 30 and set(found.values()) == {1}, {name: count for name, count in found.items() if count > 1}
