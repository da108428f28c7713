"""Every Triton kernel, compiled for two architectures without a GPU, in a process of its own: others run the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
from kvloom.kernels.triton import compiled
print(json.dumps([{**one._asdict(), "ptx": None, "wide": one.wide_loads, "multiplies": one.tensor_cores,
                   "copies": one.ptx.count("cp.async.cg.shared.global"), "limit": compiled.SHARED[one.arch],
                   "occupancy": one.occupancy} for one in compiled.every()]))
"""


def test_kernels_compile_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout)
    assert {one["arch"] for one in built} == {80, 90}
    for one in built:
        name = f"{one['call']}: {one['kernel']} for sm_{one['arch']}"
        assert one["spilled"] == 0, f"{name} spills {one['spilled']} bytes"
        assert one["shared"] <= one["limit"], f"{name} wants {one['shared']} bytes of shared memory"
        assert 0 < one["occupancy"] <= 1, name
    for one in built:
        if one["call"] in ("decode", "lists", "chunk", "score") and one["kernel"] == "attend":
            assert one["multiplies"] == ("wgmma" if (one["call"], one["arch"]) == ("chunk", 90) else "mma")
            assert one["copies"], f"keys are not copied 16 bytes at once: {one}"
    moved = {"attend", "merge", "fold", "_store", "_rotate", "_rotate_store", "_add_rms_norm", "_silu_mul"}
    assert {one["kernel"] for one in built if one["wide"]} >= moved
