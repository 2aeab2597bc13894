"""What Numba has no spelling for: raw loads, an atomic counter, reductions, a vectorisable exponential."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

F64, F32, BF16, F16 = range(4)
"""Codes of the storage types in memory."""


@intrinsic
def fetch_add(typingctx, counter):
    """Take the next value of an int64 counter that several threads share."""

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


def _element(builder, address, index, llvm_type):
    # Indexing the pointer, not the integer, is what lets the vectoriser see consecutive loads.
    return builder.gep(builder.inttoptr(address, llvm_type.as_pointer()), [index])


@intrinsic
def load_f64(typingctx, address, index):
    """Element ``index`` of the float64 array at ``address``."""

    def codegen(context, builder, signature, args):
        return builder.load(_element(builder, *args, ir.DoubleType()))

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def load_f32(typingctx, address, index):
    """Element ``index`` of the float32 array at ``address``."""

    def codegen(context, builder, signature, args):
        return builder.load(_element(builder, *args, ir.FloatType()))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def load_bf16(typingctx, address, index):
    """Element ``index`` of the bfloat16 array at ``address``, as float32."""

    def codegen(context, builder, signature, args):
        i32 = ir.IntType(32)
        bits = builder.zext(builder.load(_element(builder, *args, ir.IntType(16))), i32)
        return builder.bitcast(builder.shl(bits, i32(16)), ir.FloatType())

    return types.float32(types.int64, types.int64), codegen


def single_of_half(builder, bits):
    """float32 of the bits of a float16 in an i32, or vectors of both.

    By integer operations: LLVM's conversion becomes a call that is not there on processors without F16C.
    """
    vector = isinstance(bits.type, ir.VectorType)
    f32 = ir.VectorType(ir.FloatType(), bits.type.count) if vector else ir.FloatType()

    def constant(type_, value):
        return ir.Constant(type_, [value] * type_.count if vector else value)

    def i32(value):
        return constant(bits.type, value)

    magnitude = builder.and_(bits, i32(0x7FFF))
    # The exponents differ by 112; multiplying by 2**112 mends it and normalises subnormals.
    shifted = builder.shl(magnitude, i32(13))
    scaled = builder.fmul(builder.bitcast(shifted, f32), constant(f32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, i32(0x7C00))
    payload = builder.or_(shifted, i32(0x7F800000))
    finite_or_not = builder.select(special, payload, builder.bitcast(scaled, bits.type))
    sign = builder.shl(builder.and_(bits, i32(0x8000)), i32(16))
    return builder.bitcast(builder.or_(finite_or_not, sign), f32)


@intrinsic
def load_f16(typingctx, address, index):
    """Element ``index`` of the float16 array at ``address``, as float32."""

    def codegen(context, builder, signature, args):
        bits = builder.load(_element(builder, *args, ir.IntType(16)))
        return single_of_half(builder, builder.zext(bits, ir.IntType(32)))

    return types.float32(types.int64, types.int64), codegen


LANES = 16
"""Elements that a reduction over a row takes at a time."""


def _reduction(name, doc, start, combine):
    """An intrinsic that reduces ``count`` elements of a tile, a constant multiple of LANES.

    Written in vectors, in a fixed order: such loops vectorise only where the compiler may reorder sums or
    assume NaN away.
    """

    @intrinsic(prefer_literal=True)
    def reduce(typingctx, tile, first, count):
        if not isinstance(count, types.IntegerLiteral):
            return None
        element, size = tile.dtype, count.literal_value

        def codegen(context, builder, signature, args):
            scalar = context.get_value_type(element)
            vector, i32 = ir.VectorType(scalar, LANES), ir.IntType(32)
            data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
            align = 4 if element == types.float32 else 8
            result = ir.Constant(vector, [ir.Constant(scalar, start)] * LANES)
            for offset in range(0, size, LANES):
                at = builder.gep(data, [builder.add(args[1], ir.Constant(ir.IntType(64), offset))])
                part = builder.load(builder.bitcast(at, vector.as_pointer()), align=align)
                result = combine(builder, part, result)
            for width in (8, 4, 2, 1):
                order = ir.Constant(ir.VectorType(i32, LANES), [(i + width) % LANES for i in range(LANES)])
                result = combine(builder, builder.shuffle_vector(result, result, order), result)
            return builder.extract_element(result, i32(0))

        return element(tile, first, count), codegen

    reduce.__name__, reduce.__doc__ = name, doc
    return reduce


maximum = _reduction(
    "maximum",
    "Largest of tile.flat[first:first+count] that is not NaN, -inf if there is none.",
    float("-inf"),
    lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y),
)
total = _reduction(
    "total", "Sum of tile.flat[first:first+count].", 0.0, lambda builder, x, y: builder.fadd(y, x)
)


def _minimax_exp_coefficients(degree: int) -> np.ndarray:
    """Coefficients of a polynomial for (exp(r) - 1 - r) / r**2 on |r| <= log(2)/2, at Chebyshev nodes."""
    nodes = np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree)) * (0.51 * math.log(2))
    with np.errstate(invalid="ignore"):
        values = (np.expm1(nodes) - nodes) / nodes**2
    return (
        np.polynomial.chebyshev.Chebyshev.fit(nodes, values, degree)
        .convert(kind=np.polynomial.Polynomial)
        .coef
    )


_EXP_COEFFICIENTS = [float(np.float32(c)) for c in _minimax_exp_coefficients(5)]
_LOG2_HIGH, _LOG2_LOW = 0.693359375, -2.12194440e-4  # nine bits and the rest: n * high is exact
_EXP_MINIMUM = -87.0
_ROUND = 1.5 * 2**23


@intrinsic
def exp_f32(typingctx, x):
    """exp(x) of a float32 x <= 0 to 2 units in the last place; 0 below -87, NaN for NaN.

    Straight-line code, so that loops over it vectorise; a call into libm would not.
    """

    def codegen(context, builder, signature, args):
        (x,) = args
        f32, i32 = ir.FloatType(), ir.IntType(32)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(f32, [f32] * 3), "llvm.fmuladd.f32"
        )
        # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
        shifted = builder.call(fma, [x, f32(1.0 / math.log(2)), f32(_ROUND)])
        n = builder.fsub(shifted, f32(_ROUND))
        r = builder.call(fma, [n, f32(-_LOG2_HIGH), x])
        r = builder.call(fma, [n, f32(-_LOG2_LOW), r])
        p = f32(_EXP_COEFFICIENTS[-1])
        for c in reversed(_EXP_COEFFICIENTS[:-1]):
            p = builder.call(fma, [p, r, f32(c)])
        p = builder.call(fma, [builder.fmul(p, r), r, r])
        p = builder.fadd(p, f32(1.0))
        exponent = builder.shl(builder.bitcast(shifted, i32), i32(23))
        power = builder.bitcast(builder.add(exponent, i32(0x3F800000)), f32)
        # Of a NaN the power is anything, but the product NaN: its payload must not reach the exponent.
        value = builder.fmul(p, power)
        low = builder.fcmp_ordered("<", x, f32(_EXP_MINIMUM))
        return builder.select(low, f32(0.0), value)

    return types.float32(types.float32), codegen


def exp(x):
    """exp(x) for x <= 0 in the type of ``x``; for use in compiled code."""
    raise NotImplementedError("compiled code only")


@overload(exp, inline="always")
def _exp(x):
    if x == types.float32:
        return lambda x: exp_f32(x)
    return lambda x: math.exp(x)
