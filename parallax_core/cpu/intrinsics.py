"""What Numba has no spelling for: raw loads, an atomic counter, rows in vectors, an exponential for them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F64, F32, BF16, F16 = range(4)
"""Codes of the storage types in memory."""


@intrinsic
def fetch_add(typingctx, counter):
    """Take the next value of an int64 counter that several threads share."""

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


def _prefetch(locality, doc):
    def prefetch(typingctx, address):
        def codegen(context, builder, signature, args):
            pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0"
            )
            builder.call(function, [builder.inttoptr(args[0], pointer), i32(0), i32(locality), i32(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    prefetch.__doc__ = doc
    return intrinsic(prefetch)


prefetch = _prefetch(3, "Ask for the cache line at an address, which may be any.")
prefetch_to_second = _prefetch(2, "The same, into the second-level cache alone.")


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
"""Elements of a row that the functions below take at a time: their counts are multiples of it."""


class _Row:
    """Emits code for vectors of LANES elements: of a row, a tile's flat elements from ``first``.

    Sums over a row vectorise only where the compiler may reorder them, and maxima only where it may assume
    NaN away; so they are written in vectors here, in an order of their own.
    """

    def __init__(self, context, builder, tile_type, tile):
        self.builder = builder
        self.scalar = context.get_value_type(tile_type.dtype)
        self.vector = ir.VectorType(self.scalar, LANES)
        self.align = tile_type.dtype.bitwidth // 8
        self.data = cgutils.create_struct_proxy(tile_type)(context, builder, tile).data

    def spread(self, value):
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(
            one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        )

    def pointer(self, first, offset):
        at = self.builder.gep(self.data, [self.builder.add(first, offset)])
        return self.builder.bitcast(at, self.vector.as_pointer())

    def load(self, first, offset):
        return self.builder.load(self.pointer(first, offset), align=self.align)

    def store(self, value, first, offset):
        self.builder.store(value, self.pointer(first, offset), align=self.align)

    def fold(self, count, start, step, combine):
        """Combine ``step(offset)``, offset = 0, LANES, .. below ``count``, into one element."""
        builder, i32 = self.builder, ir.IntType(32)
        start = ir.Constant(self.vector, [ir.Constant(self.scalar, start)] * LANES)
        result = cgutils.alloca_once_value(builder, start)
        zero, lanes = ir.Constant(count.type, 0), ir.Constant(count.type, LANES)
        with cgutils.for_range_slice(builder, zero, count, lanes, count.type) as (offset, _):
            builder.store(combine(step(offset), builder.load(result)), result)
        result = builder.load(result)
        for width in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(i32, LANES), [(i + width) % LANES for i in range(LANES)])
            result = combine(builder.shuffle_vector(result, result, order), result)
        return builder.extract_element(result, i32(0))


@intrinsic
def scale_to_maximum(typingctx, tile, first, count, factor):
    """tile.flat[first:first+count] is multiplied by ``factor``; returns its largest, -inf if all are NaN."""

    def codegen(context, builder, signature, args):
        tile, first, count, factor = args
        row = _Row(context, builder, signature.args[0], tile)
        factor = row.spread(factor)

        def step(offset):
            x = builder.fmul(row.load(first, offset), factor)
            row.store(x, first, offset)
            return x

        def larger(x, y):
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        return row.fold(count, float("-inf"), step, larger)

    return tile.dtype(tile, types.int64, types.int64, tile.dtype), codegen


@intrinsic
def exponentials(typingctx, tile, first, count, m):
    """tile.flat[first:first+count] becomes its exp(x - m); returns the sum."""

    def codegen(context, builder, signature, args):
        tile, first, count, m = args
        row = _Row(context, builder, signature.args[0], tile)
        m = row.spread(m)

        def step(offset):
            weight = _exp(builder, builder.fsub(row.load(first, offset), m))
            row.store(weight, first, offset)
            return weight

        return row.fold(count, 0.0, step, builder.fadd)

    return tile.dtype(tile, types.int64, types.int64, tile.dtype), codegen


@intrinsic
def shifted_products(typingctx, tile, first, t_first, count, shift):
    """t, from ``t_first`` of tile.flat, becomes w * (t - shift), w from ``first``; returns the sum."""

    def codegen(context, builder, signature, args):
        tile, first, t_first, count, shift = args
        row = _Row(context, builder, signature.args[0], tile)
        shift = row.spread(shift)

        def step(offset):
            t = builder.fsub(row.load(t_first, offset), shift)
            product = builder.fmul(row.load(first, offset), t)
            row.store(product, t_first, offset)
            return product

        return row.fold(count, 0.0, step, builder.fadd)

    return tile.dtype(tile, types.int64, types.int64, types.int64, tile.dtype), codegen


class _Exponential(NamedTuple):
    """What evaluates exp(x) as 2**n * exp(r), r = x - n log(2), in one element type."""

    log2_high: float
    """log(2) to so few bits that n * log2_high is exact."""
    log2_low: float
    mantissa: int
    bias: int
    minimum: float
    """What lies below is 0; the least whole number whose exponential is not subnormal."""
    coefficients: tuple[float, ...]


def _minimax_exp_coefficients(degree: int, dtype) -> tuple[float, ...]:
    """Coefficients of a polynomial for (exp(r) - 1 - r) / r**2 on |r| <= log(2)/2, at Chebyshev nodes."""
    nodes = np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree)) * (0.51 * math.log(2))
    fit = np.polynomial.chebyshev.Chebyshev.fit(nodes, (np.expm1(nodes) - nodes) / nodes**2, degree)
    return tuple(float(dtype(c)) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


_EXPONENTIALS = {
    32: _Exponential(0.693359375, -2.12194440e-4, 23, 127, -87.0, _minimax_exp_coefficients(4, np.float32)),
    64: _Exponential(
        6.93147180369123816490e-1, 1.90821492927058770002e-10, 52, 1023, -708.0,
        _minimax_exp_coefficients(9, np.float64),
    ),
}  # fmt: skip


def _exp(builder, x):
    """exp(x) of x <= 0, float32 or float64, a scalar or a vector: see :func:`exp`."""
    lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
    scalar = x.type.element if lanes else x.type
    bits = 32 if isinstance(scalar, ir.FloatType) else 64
    integer = ir.VectorType(ir.IntType(bits), lanes) if lanes else ir.IntType(bits)
    parts = _EXPONENTIALS[bits]
    name = f"llvm.fmuladd.{f'v{lanes}' if lanes else ''}f{bits}"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type] * 3), name)

    def constant(value, of=x.type):
        return ir.Constant(of, [value] * lanes if lanes else value)

    # Adding 1.5 * 2**mantissa rounds to an integer and leaves it in the low bits, ready to be an exponent.
    rounder = constant(1.5 * 2.0**parts.mantissa + parts.bias)
    shifted = builder.call(fma, [x, constant(1.0 / math.log(2)), rounder])
    n = builder.fsub(shifted, rounder)
    r = builder.call(fma, [n, constant(-parts.log2_high), x])
    r = builder.call(fma, [n, constant(-parts.log2_low), r])
    p = constant(parts.coefficients[-1])
    for c in (*reversed(parts.coefficients[:-1]), 1.0, 1.0):
        p = builder.call(fma, [p, r, constant(c)])
    exponent = builder.shl(builder.bitcast(shifted, integer), constant(parts.mantissa, integer))
    # Of a NaN the power is anything, but the product NaN: its payload must not reach the exponent.
    value = builder.fmul(p, builder.bitcast(exponent, x.type))
    return builder.select(builder.fcmp_ordered("<", x, constant(parts.minimum)), constant(0.0), value)


@intrinsic
def exp(typingctx, x):
    """exp(x) of x <= 0 to 2 units in the last place; 0 where it would be subnormal, NaN for NaN.

    Straight-line code, so that loops over it vectorise; a call into libm would not.
    """
    return x(x), lambda context, builder, signature, args: _exp(builder, args[0])
