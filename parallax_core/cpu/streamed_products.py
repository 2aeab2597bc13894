"""Products of a few rows of a workspace with keys or values where they lie in memory, held in registers.

Every vector of the cache is loaded and converted once for all rows of a block.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .intrinsics import BF16, F16, F32, F64, single_of_half

_FEATURES = llvm.get_host_cpu_features()
_WIDE = _FEATURES.get("avx512f", False)
VECTOR_BYTES = 64 if _WIDE else 32
ACCUMULATORS = 16 if _WIDE else 8
"""Sums of a block: half of the vector registers, the rest for operands."""


def _storage_type(code):
    return {F64: ir.DoubleType(), F32: ir.FloatType(), BF16: ir.IntType(16), F16: ir.HalfType()}[code]


class _Vectors:
    """Vectors of the compute type ``element``, and how rows of storage type ``code`` are read as such."""

    def __init__(self, context, builder, element, code):
        self.builder, self.code = builder, code
        self.scalar = context.get_value_type(element)
        self.lanes = VECTOR_BYTES * 8 // element.bitwidth
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.stored = ir.VectorType(_storage_type(code), self.lanes)
        name = f"v{self.lanes}f{element.bitwidth}"
        self._muladd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.type, [self.type] * 3), f"llvm.fmuladd.{name}"
        )
        self.align = element.bitwidth // 8

    def zero(self):
        return ir.Constant(self.type, [ir.Constant(self.scalar, 0.0)] * self.lanes)

    def muladd(self, a, b, c):
        return self.builder.call(self._muladd, [a, b, c])

    def pointer(self, data, index):
        return self.builder.bitcast(self.builder.gep(data, [index]), self.type.as_pointer())

    def load(self, data, index):
        return self.builder.load(self.pointer(data, index), align=self.align)

    def spread(self, value):
        undefined = ir.Constant(self.type, ir.Undefined)
        i32 = ir.IntType(32)
        order = ir.Constant(ir.VectorType(i32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(
            self.builder.insert_element(undefined, value, i32(0)), undefined, order
        )

    def mask(self, count):
        """Lanes below ``count``."""
        i64 = ir.IntType(64)
        vector = ir.VectorType(i64, self.lanes)
        spread = self.builder.shuffle_vector(
            self.builder.insert_element(ir.Constant(vector, ir.Undefined), count, ir.IntType(32)(0)),
            ir.Constant(vector, ir.Undefined),
            ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes),
        )
        return self.builder.icmp_signed("<", ir.Constant(vector, list(range(self.lanes))), spread)

    def read(self, pointer, mask=None):
        """A vector of the cache; lanes outside the mask are 0 and not touched in memory."""
        b = self.builder
        if mask is None:
            x = b.load(b.bitcast(pointer, self.stored.as_pointer()), align=1)
        else:
            i32, name = ir.IntType(32), {F64: "f64", F32: "f32", BF16: "i16", F16: "f16"}[self.code]
            function = cgutils.get_or_insert_function(
                b.module,
                ir.FunctionType(self.stored, [self.stored.as_pointer(), i32, mask.type, self.stored]),
                f"llvm.masked.load.v{self.lanes}{name}.p0",
            )
            zero = 0 if self.code == BF16 else 0.0
            nothing = ir.Constant(self.stored, [ir.Constant(self.stored.element, zero)] * self.lanes)
            x = b.call(function, [b.bitcast(pointer, self.stored.as_pointer()), i32(1), mask, nothing])
        wide = ir.VectorType(ir.IntType(32), self.lanes)
        single = ir.VectorType(ir.FloatType(), self.lanes)
        if self.code == BF16:
            sixteen = ir.Constant(wide, [16] * self.lanes)
            x = b.bitcast(b.shl(b.zext(x, wide), sixteen), single)
        elif self.code == F16 and _FEATURES.get("f16c", False):
            x = b.fpext(x, single)
        elif self.code == F16:
            x = single_of_half(b, b.zext(b.bitcast(x, ir.VectorType(ir.IntType(16), self.lanes)), wide))
        if x.type.element == self.scalar:
            return x
        widen = b.fpext if isinstance(self.scalar, ir.DoubleType) else b.fptrunc
        return widen(x, self.type)


def _loop(builder, name, first, end, step, values, body):
    """values after ``for l in range(first, end, step): values = body(l, values)``."""
    i64 = ir.IntType(64)
    entry = builder.block
    block, after = builder.append_basic_block(name), builder.append_basic_block(f"after {name}")
    builder.cbranch(builder.icmp_signed("<", first, end), block, after)
    builder.position_at_end(block)
    l = builder.phi(i64)
    phis = [builder.phi(v.type) for v in values]
    results = body(l, phis)
    following = builder.add(l, i64(step))
    last = builder.block
    l.add_incoming(first, entry)
    l.add_incoming(following, last)
    for phi, before, result in zip(phis, values, results):
        phi.add_incoming(before, entry)
        phi.add_incoming(result, last)
    builder.cbranch(builder.icmp_signed("<", following, end), block, after)
    builder.position_at_end(after)
    finals = [builder.phi(v.type) for v in values]
    for final, before, result in zip(finals, values, results):
        final.add_incoming(before, entry)
        final.add_incoming(result, last)
    return finals


def _sums(builder, vectors):
    """The sums of a power of two of vectors, no more than they have lanes, as one vector in their order."""
    i32 = ir.IntType(32)

    def halves_added(a, b, length, span):
        """Both halves of every ``span`` lanes added, those of a and b side by side."""
        half = span // 2
        sources = (0,) if a is b else (0, length)
        low = [s + p + i for p in range(0, length, span) for s in sources for i in range(half)]
        first, second = (
            builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(low)), [i + h for i in low]))
            for h in (0, half)
        )
        return builder.fadd(first, second)

    length = vectors[0].type.count
    while length > len(vectors):
        vectors = [halves_added(x, x, length, length) for x in vectors]
        length //= 2
    span = length
    while len(vectors) > 1:
        n = len(vectors) // 2
        vectors = [halves_added(a, b, length, span) for a, b in zip(vectors[:n], vectors[n:])]
        span //= 2
    return vectors[0]


@intrinsic(prefer_literal=True)
def score_block(typingctx, S, j, A, rows, code, address, base, stride, keys, depth):
    """S[i, j + l] = A[i, :depth] . key l for the rows ``i`` of a tuple and ``keys`` keys, a constant.

    Key l is the elements of storage type ``code``, a constant, from ``base + l * stride`` of the array at
    ``address``. The rows of A are padded with zeros to whole vectors.
    """
    if not (isinstance(code, types.IntegerLiteral) and isinstance(keys, types.IntegerLiteral)):
        return None
    element, count, storage, KEYS = A.dtype, rows.count, code.literal_value, keys.literal_value

    def codegen(context, builder, signature, args):
        _, j, _, row_tuple, _, address, base, stride, _, depth = args
        i64 = ir.IntType(64)
        v = _Vectors(context, builder, element, storage)
        s_array, a_array = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]) for i in (0, 2)
        )
        lds, lda = (
            builder.udiv(builder.extract_value(x.strides, 0), i64(element.bitwidth // 8))
            for x in (s_array, a_array)
        )
        numbers = [builder.extract_value(row_tuple, n) for n in range(count)]
        a_rows = [builder.mul(i, lda) for i in numbers]
        cache = builder.inttoptr(address, v.stored.element.as_pointer())
        starts = [builder.gep(cache, [builder.add(base, builder.mul(stride, i64(l)))]) for l in range(KEYS)]

        def step(d, sums, mask=None):
            keys = [v.read(builder.gep(start, [d]), mask) for start in starts]
            sums = iter(sums)
            return [
                v.muladd(a, key, next(sums))
                for a in [v.load(a_array.data, builder.add(row, d)) for row in a_rows]
                for key in keys
            ]

        whole = builder.and_(depth, i64(-v.lanes))
        sums = [v.zero()] * (count * KEYS)
        sums = _loop(builder, "whole", i64(0), whole, v.lanes, sums, step)
        mask = v.mask(builder.sub(depth, whole))
        sums = _loop(builder, "tail", whole, depth, v.lanes, sums, lambda d, x: step(d, x, mask))
        per = max(1, min(count * KEYS, v.lanes) // KEYS)
        for n in range(0, count, per):
            total = _sums(builder, sums[n * KEYS : (n + per) * KEYS])
            for i in range(per):
                order = ir.Constant(ir.VectorType(ir.IntType(32), KEYS), [i * KEYS + l for l in range(KEYS)])
                part = builder.shuffle_vector(total, total, order)
                at = builder.gep(s_array.data, [builder.add(builder.mul(numbers[n + i], lds), j)])
                builder.store(part, builder.bitcast(at, part.type.as_pointer()), align=v.align)
        return context.get_dummy_value()

    return types.void(S, types.int64, A, rows, code, *([types.int64] * 3), keys, types.int64), codegen


@intrinsic(prefer_literal=True)
def accumulate_block(typingctx, O, d, S, j, rows, code, address, base, stride, keys, vectors, remaining):
    """O[i, d : d + n] += sum over l < keys of S[i, j + l] * value l, for the rows ``i`` of a tuple.

    n is ``vectors`` vectors, a constant. Value l is the elements of storage type ``code``, a constant, from
    ``base + l * stride + d`` of the array at ``address``. If vectors is 0, n is one vector of which
    only ``remaining`` elements are of the value.
    """
    if not (isinstance(code, types.IntegerLiteral) and isinstance(vectors, types.IntegerLiteral)):
        return None
    element, count, storage = O.dtype, rows.count, code.literal_value
    masked = vectors.literal_value == 0
    width = max(1, vectors.literal_value)

    def codegen(context, builder, signature, args):
        _, d, _, j, row_tuple, _, address, base, stride, keys, _, remaining = args
        i64 = ir.IntType(64)
        v = _Vectors(context, builder, element, storage)
        o_array, s_array = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]) for i in (0, 2)
        )
        ldo, lds = (
            builder.udiv(builder.extract_value(x.strides, 0), i64(element.bitwidth // 8))
            for x in (o_array, s_array)
        )
        numbers = [builder.extract_value(row_tuple, n) for n in range(count)]
        offsets = [i64(c * v.lanes) for c in range(width)]
        places = [
            v.pointer(o_array.data, builder.add(builder.add(builder.mul(i, ldo), d), c))
            for i in numbers
            for c in offsets
        ]
        weights = [builder.gep(s_array.data, [builder.add(builder.mul(i, lds), j)]) for i in numbers]
        start = builder.gep(builder.inttoptr(address, v.stored.element.as_pointer()), [builder.add(base, d)])
        mask = v.mask(remaining) if masked else None

        def step(l, sums):
            value = builder.gep(start, [builder.mul(l, stride)])
            parts = [v.read(builder.gep(value, [c]), mask) for c in offsets]
            sums = iter(sums)
            return [
                v.muladd(w, part, next(sums))
                for w in [v.spread(builder.load(builder.gep(row, [l]))) for row in weights]
                for part in parts
            ]

        sums = [builder.load(place, align=v.align) for place in places]
        sums = _loop(builder, "keys", i64(0), keys, 1, sums, step)
        for place, value in zip(places, sums):
            builder.store(value, place, align=v.align)
        return context.get_dummy_value()

    return types.void(
        O, types.int64, S, types.int64, rows, code, *([types.int64] * 4), vectors, types.int64
    ), codegen
