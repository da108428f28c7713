"""Cutting a step's rows into work: units, splits and tasks. Plain numpy, once per step.

    unit   one query row, or a tile of consecutive rows of a prefill chunk, for one KV head
    split  a slice [i * split_len, (i + 1) * split_len) of the keys a unit sees; states of splits are merged
    task   one split of one unit: what a thread takes

A unit's splits depend on that unit's own key count only (and a chunk's on its own rows), so a row's result does not depend,
bit for bit, on what else is in the batch or on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvloom.kernels.cpu.vector import LANES
from kvloom.kernels.interface import Counters, Rows

Ints = NDArray[np.int64]

TILE_LANES = 2 * LANES  # (row, query head) pairs computed together in a prefill tile
MIN_TILE_ROWS = 4  # a shorter chunk runs row by row
MIN_SPLIT, MAX_SPLITS = 256, 32
CHUNK_SPLIT, CHUNK_SPLIT_ROWS = 2048, 64  # chunks of few rows split their keys too: they have few tiles

# Columns of the unit table; addresses are raw. A unit of 0 tile rows is a single row.
UNIT_FIELDS = 11
ROW, TILE_ROWS, HEAD, TABLE, LIST, LISTED, START, COUNT, SPLITS, SPLIT_LEN, PART = range(UNIT_FIELDS)


@dataclass(frozen=True, slots=True)
class Partition:
    """Units: [units, UNIT_FIELDS]; tasks: [tasks, 2] of (unit, split), long ones first; both int64 and contiguous.

    parts: fp32 elements that the states of split units need; counts: what one pass adds to the counters (score_bytes
    holds element counts of K, the other bytes those of K and V; the caller multiplies by the element size).
    """

    units: Ints
    tasks: Ints
    parts: int
    counts: Counters


def _chunk_bounds(rows: Rows, start: Ints, stop: Ints, listed: Ints, alone: int) -> tuple[Ints, Ints]:
    """First rows and lengths of the maximal chunks: one request, the same starts and lists, stops growing by 1.

    alone: of the first so many rows each is a chunk of its own.
    """
    request = rows.request.numpy()
    joined = (request[1:] == request[:-1]) & (stop[1:] == stop[:-1] + 1)
    joined &= ((start[1:] == start[:-1]) & (stop[:-1, None] > start[:-1])).all(axis=1)
    if rows.lists is not None:
        offsets = rows.lists.offsets.numpy()
        same = (offsets[1:] == offsets[:-1]) | (listed[1:] == 0)
        joined &= (same & (listed[1:] == listed[:-1])).all(axis=1)
    joined[:alone] = False
    first = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    return first, np.diff(first, append=len(start))


def _tiles(first: Ints, length: Ints, per_tile: int) -> tuple[Ints, Ints, Ints]:
    """(row, tile rows or 0, rows of the chunk) of every unit of one head: long chunks as tiles, other rows one by one."""
    tiled = length >= MIN_TILE_ROWS
    step = np.where(tiled, per_tile, 1)
    pieces = -(-length // step)
    chunk = np.repeat(np.arange(len(first)), pieces)
    within = (np.arange(len(chunk)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * step[chunk]
    tile_rows = np.where(tiled[chunk], np.minimum(per_tile, length[chunk] - within), 0)
    return first[chunk] + within, tile_rows, length[chunk]


def _split_length(count: Ints, tile_rows: Ints, chunk_rows: Ints) -> Ints:
    """Keys per split of every unit, a multiple of 64."""
    single = np.maximum(MIN_SPLIT, -(-count // (64 * MAX_SPLITS)) * 64)
    tile = np.where(chunk_rows <= CHUNK_SPLIT_ROWS, np.maximum(CHUNK_SPLIT, single), np.maximum(count, 1))
    return np.where(tile_rows > 0, tile, single)


def partition(rows: Rows, q_heads: int, kv_heads: int, head_dim: int, width: int, alone: int) -> Partition:
    """Cut `rows` into units and tasks. width: padded head_dim of scratch rows; alone: first rows that join no tile."""
    stop = rows.stop.numpy().astype(np.int64)
    start = rows.start.numpy().astype(np.int64)
    if start.ndim == 1:
        start = start[:, None]
    listed = np.zeros((rows.size, 1), np.int64) if rows.lists is None else rows.lists.lengths.numpy().astype(np.int64)
    group = q_heads // kv_heads
    if rows.size == 0:
        empty = np.zeros((0, UNIT_FIELDS), np.int64)
        return Partition(empty, empty[:, :2], 0, Counters())
    if rows.size - alone >= MIN_TILE_ROWS and group <= LANES:
        row, tile_rows, chunk_rows = _tiles(*_chunk_bounds(rows, start, stop, listed, alone), per_tile=TILE_LANES // group)
    else:
        row = np.arange(rows.size)
        tile_rows = np.zeros_like(row)
        chunk_rows = np.ones_like(row)

    units = np.zeros((len(row), kv_heads, UNIT_FIELDS), np.int64)
    last = row + np.maximum(tile_rows, 1) - 1
    units[:, :, ROW] = row[:, None]
    units[:, :, TILE_ROWS] = tile_rows[:, None]
    units[:, :, HEAD] = np.arange(kv_heads)
    tables = rows.tables
    requests = rows.request.numpy()[row].astype(np.int64)
    units[:, :, TABLE] = (tables.data_ptr() + requests * (tables.stride(0) * tables.element_size()))[:, None]
    if rows.lists is not None:
        units[:, :, LIST] = rows.lists.positions.data_ptr() + 4 * rows.lists.offsets.numpy()[row].astype(np.int64)
        units[:, :, LISTED] = listed[row]
    units[:, :, START] = start[row]
    units[:, :, COUNT] = listed[row] + stop[last][:, None] - start[row]
    count = units[:, :, COUNT]
    split_len = _split_length(count, tile_rows[:, None], chunk_rows[:, None])
    splits = np.maximum(1, -(-count // split_len))
    units[:, :, SPLITS] = splits
    units[:, :, SPLIT_LEN] = split_len
    flat: Ints = units.reshape(-1, UNIT_FIELDS)
    lanes = np.where(flat[:, TILE_ROWS] > 0, TILE_LANES, group)
    part_sizes = np.where(flat[:, SPLITS] > 1, flat[:, SPLITS] * lanes * (width + 2), 0)
    ends = np.cumsum(part_sizes)
    flat[:, PART] = ends - part_sizes
    seen = listed + stop[:, None] - start
    visible = int(seen.sum()) * (kv_heads // seen.shape[1])
    keys = int(flat[:, COUNT].sum()) * head_dim
    counts = Counters(rows.size, visible, 2 * keys, keys, 2 * int(flat[:, LISTED].sum()) * head_dim)
    return Partition(flat, _tasks(flat), int(ends[-1]), counts)


def _tasks(units: Ints) -> Ints:
    """All (unit, split) pairs; those that take longest first, so that threads finish together."""
    splits = units[:, SPLITS]
    unit = np.repeat(np.arange(len(units)), splits)
    split = np.arange(len(unit)) - np.repeat(np.cumsum(splits) - splits, splits)
    tasks = np.stack([unit, split], axis=1)
    if len(units) > 1:
        cost = np.minimum(units[:, COUNT], units[:, SPLIT_LEN]) * np.where(units[:, TILE_ROWS] > 0, 8, 1)
        tasks = tasks[np.argsort(-cost[unit], kind="stable")]
    return np.ascontiguousarray(tasks)
