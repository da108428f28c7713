"""Explicitly vectorised inner loops of attention, written as LLVM IR because no loop optimiser finds them reliably.

Two shapes do the arithmetic; `widen` converts a row of the cache and `peak` finds a maximum, each without the alias and
trip-count checks that a short loop would spend its time on. All matrices are fp32 scratch, addresses are int64, strides
count elements.

    mac  C[i, :] (+)= sum over k of A[i, k] * B[k, :]   a few rows and columns of C at once, an outer product per k
    dot  S[i] = sum over c of Q[i, c] * K[c]                    M query heads against one key row, c a multiple of 16

LLVM lowers a vector of 16 floats to whatever the machine has (one AVX-512, two AVX or four NEON registers).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_I32 = ir.IntType(32)
_REDUCE_MAX = ir.FunctionType(_FLOAT, [_VECTOR])
_REDUCE = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
_CONTRACT = ("contract",)


def _at(builder, base, index, element):
    return builder.bitcast(builder.gep(base, [index]), element.as_pointer())


def _splat(builder, value):
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
    mask = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(_VECTOR, ir.Undefined), mask)


def _make_mac(rows: int, vectors: int, fresh: bool):
    @intrinsic
    def mac(typingctx, c, c_row, a, a_row, a_col, b, b_row, count):
        def codegen(context, builder, signature, args):
            c, c_row, a, a_row, a_col, b, b_row, count = args
            c, a, b = (builder.inttoptr(address, _FLOAT.as_pointer()) for address in (c, a, b))
            number = ir.IntType(64)
            tiles = [(number(i), number(LANES * j)) for i in range(rows) for j in range(vectors)]
            out = [_at(builder, c, builder.add(builder.mul(c_row, i), j), _VECTOR) for i, j in tiles]
            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in tiles]
            for total, address in zip(sums, out):
                builder.store(ir.Constant(_VECTOR, None) if fresh else builder.load(address, align=4), total)
            with cgutils.for_range(builder, count) as loop:
                line = builder.mul(b_row, loop.index)
                lanes = [builder.load(_at(builder, b, builder.add(line, number(LANES * j)), _VECTOR), align=4)
                         for j in range(vectors)]  # fmt: skip
                column = builder.gep(a, [builder.mul(a_col, loop.index)])
                factors = [_splat(builder, builder.load(builder.gep(column, [builder.mul(a_row, number(i))])))
                           for i in range(rows)]  # fmt: skip
                for at, total in enumerate(sums):
                    product = builder.fmul(factors[at // vectors], lanes[at % vectors], flags=_CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
            for total, address in zip(sums, out):
                builder.store(builder.load(total), address, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return mac


def _make_dot(rows: int):
    @intrinsic
    def dot(typingctx, s, s_row, q, q_row, k, count):
        def codegen(context, builder, signature, args):
            s, s_row, q, q_row, k, count = args
            s, q, k = (builder.inttoptr(address, _FLOAT.as_pointer()) for address in (s, q, k))
            index = [ir.IntType(64)(i) for i in range(rows)]
            sums = [cgutils.alloca_once(builder, _VECTOR) for _ in index]
            for total in sums:
                builder.store(ir.Constant(_VECTOR, None), total)
            steps = builder.udiv(count, ir.IntType(64)(LANES))
            with cgutils.for_range(builder, steps) as loop:
                column = builder.mul(loop.index, ir.IntType(64)(LANES))
                key = builder.load(_at(builder, k, column, _VECTOR), align=4)
                for total, i in zip(sums, index):
                    query = builder.load(_at(builder, q, builder.add(builder.mul(q_row, i), column), _VECTOR), align=4)
                    product = builder.fmul(query, key, flags=_CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
            reduce = cgutils.get_or_insert_function(builder.module, _REDUCE, "llvm.vector.reduce.fadd.v16f32")
            for total, i in zip(sums, index):
                value = builder.call(reduce, [_FLOAT(0.0), builder.load(total)], fastmath=("reassoc",))
                builder.store(value, builder.gep(s, [builder.mul(s_row, i)]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return dot


@intrinsic
def widen(typingctx, target, source, count, kind):
    """Convert `count` elements of `kind`, a multiple of 16, to fp32."""
    raw = ir.VectorType(ir.FloatType() if isinstance(kind, types.Float) else ir.IntType(16), LANES)
    wide = ir.VectorType(_I32, LANES)

    def convert(builder, lanes):
        if isinstance(kind, types.Float):
            return lanes
        if kind.signed:  # fp16, see `scalar`
            return builder.fpext(builder.bitcast(lanes, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)
        return builder.bitcast(builder.shl(builder.zext(lanes, wide), ir.Constant(wide, [16] * LANES)), _VECTOR)

    def codegen(context, builder, signature, args):
        target, source = builder.inttoptr(args[0], _VECTOR.as_pointer()), builder.inttoptr(args[1], raw.as_pointer())
        with cgutils.for_range(builder, builder.udiv(args[2], ir.IntType(64)(LANES))) as loop:
            lanes = builder.load(builder.gep(source, [loop.index]), align=kind.bitwidth // 8)
            builder.store(convert(builder, lanes), builder.gep(target, [loop.index]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, kind), codegen


@intrinsic
def peak(typingctx, address, count):
    """The largest of `count` fp32, a multiple of 16; -inf if count is 0. NaN may or may not be found."""

    def codegen(context, builder, signature, args):
        base = builder.inttoptr(args[0], _VECTOR.as_pointer())
        best = cgutils.alloca_once(builder, _VECTOR)
        builder.store(ir.Constant(_VECTOR, [float("-inf")] * LANES), best)
        with cgutils.for_range(builder, builder.udiv(args[1], ir.IntType(64)(LANES))) as loop:
            lanes, top = builder.load(builder.gep(base, [loop.index]), align=4), builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", lanes, top), lanes, top), best)
        reduce = cgutils.get_or_insert_function(builder.module, _REDUCE_MAX, "llvm.vector.reduce.fmax.v16f32")
        return builder.call(reduce, [builder.load(best)])

    return types.float32(types.int64, types.int64), codegen


# mac*(c, c_row, a, a_row, a_col, b, b_row, count) adds to C; fresh* overwrites it. mac<rows>x<vectors of C's columns>:
# enough sums at once to hide the latency of an addition, few enough for the registers.
mac1x1, mac2x1, mac4x1, mac8x1 = (_make_mac(rows, 1, fresh=False) for rows in (1, 2, 4, 8))
mac1x4, mac2x4, mac3x4, mac4x4 = (_make_mac(rows, 4, fresh=False) for rows in (1, 2, 3, 4))
fresh8x1 = _make_mac(8, 1, fresh=True)
# dot*(s, s_row, q, q_row, k, count)
dot1, dot2, dot3, dot4 = (_make_dot(rows) for rows in (1, 2, 3, 4))
