"""Random weights in a GGUF's formats, and what they stand for by the package gguf."""

from __future__ import annotations

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from kvloom.kernels.quantized import KINDS, StoredWeight

ALL = tuple(KINDS)
_FACTORS = {"Q6_K": (208,), **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,))}
"""Where in a block its fp16 factors lie; of those that are not named, at 0 and 2."""


def random_stored(kind: str, outputs: int, inputs: int) -> StoredWeight:
    """Any codes, under factors of ordinary sizes and, where there are minima, of both signs."""
    made, block = np.random.default_rng(outputs + inputs), KINDS[kind]
    raw = made.integers(0, 256, (outputs, inputs // block.values, block.nbytes), dtype=np.uint8)
    for at in _FACTORS.get(kind, (0, 2)):
        factors = made.uniform(-0.01 if at == 2 else 0.001, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = factors[..., None].view(np.uint8)
    return StoredWeight(kind, torch.from_numpy(raw.reshape(outputs, -1)), (outputs, inputs))


def dense_of(stored: StoredWeight) -> Tensor:
    """[outputs, inputs] fp64."""
    return torch.from_numpy(quants.dequantize(stored.blocks.numpy(), GGMLQuantizationType[stored.kind])).double()
