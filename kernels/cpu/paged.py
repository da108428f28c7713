"""Reading keys and values out of paged storage into fp32 scratch: first where the rows are, then the rows."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from kvloom.kernels.cpu.compiler import device
from kvloom.kernels.cpu.scalar import get_int, get_long, prefetch, put, read, size_of, store
from kvloom.kernels.cpu.vector import LANES, widen

_LINE = 64  # bytes


@device
def locate(k_at, v_at, k, k_strides, v, v_strides, block_size, table, list_at, listed, start, begin, end, kind):
    """Write the addresses of the rows seen as numbers [begin, end), list first, then tail, to k_at and v_at (int64 each).

    k, v: address of the head's element in block 0; strides: (block, head, token) in elements.
    """
    size = size_of(kind)
    i = begin
    while i < end:
        if i < listed:
            position = get_int(list_at, i)
            limit = i + 1
        else:
            position = start + i - listed
            limit = end
        offset = position % block_size
        block = get_int(table, position // block_size)
        run = min(block_size - offset, limit - i)
        k_row = k + size * (block * k_strides[0] + offset * k_strides[2])
        v_row = v + size * (block * v_strides[0] + offset * v_strides[2])
        for j in range(run):
            store(k_at, i - begin + j, k_row + j * size * k_strides[2])
            store(v_at, i - begin + j, v_row + j * size * v_strides[2])
        i += run


@device
def ask(row_at, j, dim, kind):
    """Ask for the cache lines of row j of a list of addresses. Blocks are too short for the hardware to guess the next."""
    row = get_long(row_at, j)
    for byte in range(0, size_of(kind) * dim, _LINE):
        prefetch(row + byte)


@device
def fill(target, width, row_at, count, dim, kind, ahead):
    """Copy rows to target: [count, width] fp32. ahead: addresses of rows to ask for meanwhile, or 0."""
    vectors = dim // LANES * LANES
    for j in range(count):
        if ahead != 0:
            ask(ahead, j, dim, kind)
        to, source = target + 4 * j * width, get_long(row_at, j)
        widen(to, source, vectors, kind)
        for c in range(vectors, dim):
            put(to, c, read(source, c, kind))
