"""Moved keys are the keys of their new position, for every kind of rotary embedding that is served."""

from __future__ import annotations

import pytest
import torch

from kvloom import kernels
from kvloom.engine.model.rope import RopeConfig, rotary_table, yarn_attention_factor
from kvloom.kernels.interface import PagedKV

DIM, LENGTH, HEADS = 64, 10_000, 2
KINDS = {
    "default": RopeConfig(dim=DIM),
    "theta": RopeConfig(dim=DIM, theta=500_000.0),
    "linear": RopeConfig(dim=DIM, kind="linear", factor=4.0),
    "llama3": RopeConfig(dim=DIM, theta=500_000.0, kind="llama3", factor=8.0, original_max_position=2048),
    "yarn": RopeConfig(
        dim=DIM, kind="yarn", factor=4.0, original_max_position=2048, attention_factor=yarn_attention_factor(4.0)
    ),
    "divisors": RopeConfig(dim=DIM, divisors=tuple(1.0 + i / 8 for i in range(DIM // 2))),
}


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 1, 17, -5, 8191])
def test_turning_a_key_moves_it(kind: str, shift: int, backend: str) -> None:
    engine, table = kernels.load(backend), rotary_table(KINDS[kind], LENGTH)
    positions = torch.arange(40, 72)
    rows = len(positions)
    qkv = torch.randn(rows, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(0))

    def stored(at: torch.Tensor) -> torch.Tensor:
        kv = PagedKV(*(torch.zeros(1, HEADS, rows, DIM) for _ in range(2)))
        q = torch.empty(rows, HEADS, DIM)
        engine.rotate_store(qkv, table.cos, table.sin, at, kv, torch.arange(rows), q)
        return kv.k[0].transpose(0, 1).contiguous()

    old = stored(positions)
    moved = engine.rotate(old, torch.full((rows,), shift, dtype=torch.int32), table.inv_freq, torch.empty_like(old))
    # Frequencies are kept in fp32: over thousands of positions an angle is off by some 1e-4.
    bound = 1e-5 if abs(shift) < 100 else 2e-3
    assert float((moved - stored(positions + shift)).abs().max()) < bound
    if shift:
        assert float((moved - old).abs().max()) > 0.1
