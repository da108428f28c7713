"""Machine-level pieces: typed access to raw addresses, bf16 and fp16 conversion, exp2, and an atomic counter.

Kernels take addresses (int64) and strides, not arrays: a call from Python then costs a few integers, and LLVM sees plain
pointers without index wrap-around, so it vectorises. A value of the element type (`kind`) picks the conversion:

    uint16   bf16      shift into the upper half; round to nearest even when storing
    int16    fp16      (signedness only tells it from bf16)
    float32  fp32
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvloom.kernels.cpu.compiler import device

BF16 = np.uint16(0)
FP16 = np.int16(0)
FP32 = np.float32(0)

_I32 = ir.IntType(32)
NEG_INF = np.float32(-np.inf)
LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)


def _pointer(context, builder, address, element):
    return builder.inttoptr(address, context.get_data_type(element).as_pointer())


@intrinsic
def load(typingctx, address, index, kind):
    """Raw element `index` of the array of `kind` at `address`."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, args[0], kind)
        return builder.load(builder.gep(pointer, [args[1]]), align=kind.bitwidth // 8)

    return kind(types.int64, types.int64, kind), codegen


@intrinsic
def store(typingctx, address, index, value):
    """Write a raw element of the type of `value`."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, args[0], value)
        builder.store(args[2], builder.gep(pointer, [args[1]]), align=value.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address, which need not be valid."""

    def codegen(context, builder, signature, args):
        i8, i32 = ir.IntType(8), _I32
        form = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], i8.as_pointer()), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def size_of(typingctx, kind):
    """Bytes of one element."""

    def codegen(context, builder, signature, args):
        return ir.IntType(64)(kind.bitwidth // 8)

    return types.int64(kind), codegen


@intrinsic
def bits(typingctx, value):
    """The bits of an fp32 as uint32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def fetch_add(typingctx, address, amount):
    """Atomically add to an int64 and return what was there; orders the memory accesses around it."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, args[0], types.int64)
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _widen(typingctx, raw):
    """A raw element as fp32."""

    def codegen(context, builder, signature, args):
        if isinstance(raw, types.Float):
            return args[0]
        if raw.signed:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        wide = builder.shl(builder.zext(args[0], _I32), _I32(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(raw), codegen


def _to_bfloat(builder, value):
    """fp32 to bf16 bits, to nearest even; NaN stays NaN."""
    b = builder.bitcast(value, _I32)
    upper = builder.lshr(b, _I32(16))
    odd = builder.and_(upper, _I32(1))
    rounded = builder.lshr(builder.add(builder.add(b, _I32(0x7FFF)), odd), _I32(16))
    is_nan = builder.icmp_unsigned(">", builder.and_(b, _I32(0x7FFFFFFF)), _I32(0x7F800000))
    return builder.trunc(builder.select(is_nan, builder.or_(upper, _I32(0x40)), rounded), ir.IntType(16))


@intrinsic
def _narrow(typingctx, value, kind):
    """An fp32 as a raw element of `kind`, rounded to nearest even."""

    def codegen(context, builder, signature, args):
        if isinstance(kind, types.Float):
            return args[0]
        if kind.signed:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))
        return _to_bfloat(builder, args[0])

    return kind(types.float32, kind), codegen


@intrinsic
def _power_of_two(typingctx, n):
    """2**n for an integer-valued fp32 n in [-127, 127]; n = -127 gives 0."""

    def codegen(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(exponent, _I32(23)), ir.FloatType())

    return types.float32(types.float32), codegen


@device
def read(address, index, kind):
    """Element as fp32."""
    return _widen(load(address, index, kind))


@device
def write(address, index, value, kind):
    """Store an fp32 as `kind`, rounded to nearest even."""
    store(address, index, _narrow(np.float32(value), kind))


@device
def get(address, index):
    """fp32 element."""
    return load(address, index, FP32)


@device
def put(address, index, value):
    """Store an fp32 element."""
    store(address, index, np.float32(value))


@device
def get_int(address, index):
    """int32 element as int64."""
    return np.int64(load(address, index, np.int32(0)))


@device
def get_long(address, index):
    """int64 element."""
    return load(address, index, np.int64(0))


@device
def exp2(x):
    """2**x for x <= 127, to 2 ulp; exactly 0 below -126.5. Branch-free, so that loops over it vectorise.

    Splits x = n + f with f in [-0.5, 0.5]; the polynomial for 2**f is that of exp2f in the Cephes library.
    """
    x = np.float32(-127.0) if x < np.float32(-127.0) else x  # in this order NaN stays NaN
    n = np.floor(x + np.float32(0.5))
    f = x - n
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + np.float32(1.0)
    return p * _power_of_two(n)
