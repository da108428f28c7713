"""Moving KV: from donors' segments into a request's blocks, keys turned to their new positions; and from blocks into segments.

Keys are stored as they were rotated at their donor's positions. A run moves as a whole, so one shift turns all of it:
R(p + delta) = R(delta) R(p), exact for every kind of rotary embedding whose frequencies do not depend on length, which all that
are served are. Always from the stored original, never from a copy, so rounding does not add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.device import upload
from kvloom.engine.reuse.kvshare.matching import Run
from kvloom.engine.reuse.kvshare.repair import Ints
from kvloom.engine.reuse.kvshare.scan import Placed, gather
from kvloom.kernels.interface import Kernels


def covered(runs: Sequence[Run]) -> Ints:
    """Positions of all runs, ascending."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(run.start, run.stop) for run in runs)])


@torch.inference_mode()
def copy_in(runs: Sequence[Run], sequence: Placed, storage: Storage, kernels: Kernels, inv_freq: Tensor) -> None:
    """Write the KV of runs into the sequence's own blocks."""
    pieces = [piece for run in runs for piece in run.pieces]
    spans = [(piece.segment, piece.source, piece.source + piece.length) for piece in pieces]
    shifts = np.repeat(
        [piece.target - piece.source - piece.segment.position for piece in pieces], [piece.length for piece in pieces]
    )
    delta = upload(shifts.astype(np.int32), storage.device)
    slots = sequence.slots(covered(runs), storage)
    turned = None
    for layer, kv in enumerate(storage.layers):
        k = torch.cat([segment.k[layer, first:last] for segment, first, last in spans])
        v = torch.cat([segment.v[layer, first:last] for segment, first, last in spans])
        turned = torch.empty_like(k) if turned is None else turned
        kernels.store(kernels.rotate(k, delta, inv_freq, turned), v, kv, slots)


@torch.inference_mode()
def copy_out(sequence: Placed, begin: int, end: int, storage: Storage) -> tuple[Tensor, Tensor]:
    """K and V of positions [begin, end): [layers, end - begin, kv_heads, head_dim] each."""
    slots = sequence.slots(np.arange(begin, end), storage)
    shape = (len(storage.layers), end - begin, storage.layers[0].k.shape[1], storage.layers[0].k.shape[3])
    k, v = (storage.layers[0].k.new_empty(shape) for _ in range(2))
    for layer, kv in enumerate(storage.layers):
        k[layer], v[layer] = gather(kv.k, slots), gather(kv.v, slots)
    return k, v
