"""What reused KV is worth: rows of a prompt that are looked at before it is decided which of them are computed.

    identity    layer 0 of a few rows            its KV depends on token and position alone, so copied and computed must agree:
                                                 a free check of tokens, indices and rotation on every reuse
    layers      layers [0, c] of all rows        writes their true KV, and compares the values of layer c with what was copied
    attention   layers of the last rows          who looks at what: at layer c alone, or averaged over all layers

They are rows of steps like any others, run beside other requests' (`requests.traits.Look`); nothing is read back before the
last has been computed. Everything is read from and written to the request's own blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.engine.cache import Storage
from kvloom.engine.device import upload
from kvloom.engine.model.config import ModelConfig
from kvloom.engine.requests.traits import Layer
from kvloom.engine.reuse.kvshare.repair import Floats, Ints
from kvloom.kernels.interface import Kernels, Lists, Rows

IDENTITY_ROWS = 32


class Placed(NamedTuple):
    """A request's tokens and where their KV lies."""

    tokens: Ints
    blocks: npt.NDArray[np.int32]
    block_size: int

    @classmethod
    def of(cls, tokens: Sequence[int], blocks: array[int], block_size: int) -> Placed:
        """From a request's tokens and table."""
        return cls(np.array(tokens, np.int64), np.frombuffer(blocks, np.int32).copy(), block_size)

    def slots(self, positions: Ints, storage: Storage) -> Tensor:
        """[positions] int64, on the storage's device."""
        blocks = self.blocks[positions // self.block_size].astype(np.int64)
        return upload(blocks * self.block_size + positions % self.block_size, storage.device)


class Deviation(NamedTuple):
    """How far the copied values of layer c are from the true ones, per position that was compared."""

    absolute: Floats
    """||V' - V||_1 over KV heads and dimensions."""
    relative: Floats
    """||V' - V||_2 / ||V'||_2"""


class Scanner:
    """Makes scans of prompts in one storage."""

    def __init__(self, storage: Storage, kernels: Kernels, config: ModelConfig, *, layer: int) -> None:
        """layer: the check layer c."""
        self.storage, self.kernels, self.config = storage, kernels, config
        self.layer = min(layer, config.layers - 1)

    @property
    def work_per_row(self) -> float:
        """What is looked at of all rows, in rows of a full pass."""
        return depth(self.layer, self.config.layers)

    def scan(self, sequence: Placed, reused: Ints) -> Scan:
        """Of a prompt whose positions `reused` hold copied KV. Checks identity, and whatever is added to it."""
        return Scan(self, sequence, reused)


def depth(stop: int, layers: int) -> float:
    """What a row takes that leaves before the attention of layer `stop`, in rows of a full pass."""
    return min(1.0, (stop + 0.35) / layers)


class Pass(NamedTuple):
    """Rows of a scan that are looked at for one purpose."""

    positions: Ints
    stop: int
    """See `requests.traits.Look`."""
    known: Ints | None = None
    """What they see beside each other, of rows that follow each other; None: everything up to themselves."""
    watch: range = range(0)
    """Layers whose attention is added up."""


class Scan:
    """`requests.traits.Looks` of one request, and what came of them."""

    def __init__(self, scanner: Scanner, sequence: Placed, reused: Ints) -> None:
        self._scanner, self._sequence, self._reused = scanner, sequence, reused
        self._sample = reused[:: -(-len(reused) // IDENTITY_ROWS)].copy()
        slots = sequence.slots(self._sample, scanner.storage)
        self._first = tuple(gather(cache, slots) for cache in scanner.storage.layers[0])
        self._passes = [Pass(self._sample, 0)]
        self._at = 0
        self._copied: Tensor | None = None
        self.mass = torch.zeros(len(sequence.tokens), device=scanner.storage.device)
        """Attention that watched rows pay to every position, summed over rows, heads and layers."""
        self.failure: Exception | None = None
        """What went wrong inside a step, which is others' as well; raised when the request's own turn comes."""

    def all_rows(self, begin: int) -> None:
        """Look at positions from `begin` on up to the check layer. Those before must be computed in these layers."""
        scanner, sequence = self._scanner, self._sequence
        slots = sequence.slots(self._reused, scanner.storage)
        self._copied = gather(scanner.storage.layers[scanner.layer].v, slots)
        self._passes = [Pass(np.arange(begin, len(sequence.tokens)), scanner.layer)]

    def watch(self, probe: Ints, known: Ints | None = None) -> None:
        """Look at the attention of some rows.

        known: None to look at the check layer alone, after `all_rows`. Otherwise the positions before the first of `probe`
        (which follow each other) whose KV is there in every layer: all layers count, and the rows see those positions and each
        other. Their KV is stored, and computed again with the prompt's other rows.
        """
        stop = self._scanner.layer + 1 if known is None else self._scanner.config.layers
        self._passes.append(Pass(probe, stop, known, range(stop - 1, stop) if known is None else range(stop)))

    # `requests.traits.Looks` ------------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """See `Looks`."""
        return sum(len(part.positions) for part in self._passes) - self._at

    @property
    def depth(self) -> float:
        """See `Looks`."""
        return depth(self._passes[0].stop, self._scanner.config.layers)

    def next(self, count: int) -> tuple[Ints, LookAtRows]:
        """See `Looks`: of one pass at a time."""
        part = self._passes[0]
        positions = part.positions[self._at : self._at + count]
        return positions, LookAtRows(self, self._scanner, self._sequence, part, positions)

    def advance(self, count: int) -> None:
        """See `Looks`."""
        self._at += count
        if self._at == len(self._passes[0].positions) and len(self._passes) > 1:
            self._at = 0
            self._passes.pop(0)

    # What came of them --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def identity(self) -> bool:
        """Whether layer 0's copied keys and values of sampled positions are what the model computes there.

        Sampled evenly. Tolerance: copied keys were rounded to the model's dtype before they were turned and again after.
        Raises what went wrong when rows were looked at.
        """
        if self.failure is not None:
            raise self.failure
        storage = self._scanner.storage
        slots = self._sequence.slots(self._sample, storage)
        return all(_agrees(old, gather(new, slots)) for old, new in zip(self._first, storage.layers[0]))

    @torch.inference_mode()
    def deviation(self) -> Deviation:
        """Of reused positions, after `all_rows`."""
        assert self._copied is not None
        storage = self._scanner.storage
        true = gather(storage.layers[self._scanner.layer].v, self._sequence.slots(self._reused, storage)).float()
        change = (true - self._copied.float()).flatten(1)
        norm = true.flatten(1).norm(dim=1).clamp_min(1e-12)
        return Deviation(change.abs().sum(dim=1).cpu().numpy(), (change.norm(dim=1) / norm).cpu().numpy())

    @torch.inference_mode()
    def attention(self) -> Floats:
        """Mean attention that watched rows paid to every position, over rows, heads and layers: [length]."""
        part = self._passes[0]
        rows = len(part.watch) * len(part.positions) * self._scanner.config.q_heads
        found: Floats = (self.mass / rows).cpu().numpy()
        return found


class LookAtRows:
    """`requests.traits.Look` at some rows of a pass."""

    def __init__(self, scan: Scan, scanner: Scanner, sequence: Placed, part: Pass, positions: Ints) -> None:
        self._scan, self._scanner, self._watch = scan, scanner, part.watch
        self.stop, self.depth = part.stop, depth(part.stop, scanner.config.layers)
        device = scanner.storage.device
        zeros = torch.zeros(len(positions), dtype=torch.int32, device=device)
        start, lists, columns = zeros, None, np.arange(int(positions[-1]) + 1)
        if part.known is not None:
            first = int(part.positions[0])
            start = torch.full_like(zeros, first)
            lengths = torch.full_like(zeros, len(part.known))[:, None]
            lists = Lists(upload(part.known.astype(np.int32), device), torch.zeros_like(lengths), lengths)
            columns = np.concatenate([part.known, np.arange(first, int(positions[-1]) + 1)])
        stop = upload((positions + 1).astype(np.int32), device)
        self._rows = Rows(upload(sequence.blocks, device)[None], zeros, start, stop, lists)
        self._columns = upload(columns, device)
        config = scanner.config
        self._plan = scanner.kernels.plan(self._rows, config.q_heads, config.kv_heads, config.head_dim)

    def attend(self, layer: Layer, out: Tensor) -> None:
        """See `Look`. What goes wrong here must not end the requests whose rows are in the same step."""
        try:
            self._attend(layer, out)
        except Exception as error:
            self._scan.failure = error

    def _attend(self, layer: Layer, out: Tensor) -> None:
        config, logits = self._scanner.config, None
        if layer.layer in self._watch:
            shape = (len(out), config.q_heads, len(self._columns))
            logits = torch.full(shape, float("-inf"), device=out.device)
        self._scanner.kernels.attend(layer.q, layer.kv, self._plan, scale=config.head_dim**-0.5, out=out, logits=logits)
        if logits is not None:
            self._scan.mass[self._columns] += logits.softmax(dim=2).sum(dim=(0, 1))


def gather(paged: Tensor, slots: Tensor) -> Tensor:
    """Rows of [blocks, heads, block_size, head_dim] at slots: [rows, heads, head_dim], a copy."""
    size = paged.shape[2]
    return paged[slots // size, :, slots % size]


def _agrees(copied: Tensor, fresh: Tensor) -> bool:
    """Equal but for rounding: two roundings of the dtype, relative to the row's largest entry."""
    a, b = copied.float(), fresh.float()
    bound = 4 * torch.finfo(copied.dtype).eps * b.abs().amax(dim=-1, keepdim=True) + 1e-6
    if copied.dtype == torch.float32:
        bound = bound + 1e-4 * b.abs().amax(dim=-1, keepdim=True)  # an angle's own rounding grows with the distance
    return bool(((a - b).abs() <= bound).all())
