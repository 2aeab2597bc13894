"""Matrix products of tiles: a block of C held in registers, one broadcast fused multiply-add an element of A.

NumPy's product inside a parallel loop would bring BLAS's threads, which fight ours, and its call overhead
for tiles this small.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# 32 registers of 512 bits hold 8 x 32 floats, 16 of 256 bits hold 6 x 16, operands beside them.
_WIDE = llvm.get_host_cpu_features().get("avx512f", False)
MR = 8 if _WIDE else 6
"""Rows of C in a block; row counts are padded to a multiple of it."""
NR = 32 if _WIDE else 16
"""float32 columns of C in a block, and the padding of column counts; half as many for float64."""


@intrinsic
def block(typingctx, C, c0, ldc, A, a0, rsa, csa, B, b0, ldb, depth, fresh):
    """C[c0 + i*ldc + j] += sum_l A[a0 + i*rsa + l*csa] * B[b0 + l*ldb + j] for an MR x NR block.

    With ``fresh`` C is not read but taken for 0.
    """
    element = C.dtype
    columns = NR if element == types.float32 else NR // 2

    def codegen(context, builder, signature, args):
        _, c0, ldc, _, a0, rsa, csa, _, b0, ldb, depth, fresh = args
        scalar = context.get_value_type(element)
        i64, i32 = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(scalar, columns)
        align = 4 if element == types.float32 else 8
        data = [
            cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7)
        ]
        c_data, a_data, b_data = data
        suffix = f"v{columns}f{32 if element == types.float32 else 64}"
        muladd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.{suffix}"
        )

        def vector_at(pointer, offset):
            return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

        c_rows = [
            vector_at(c_data, builder.add(c0, builder.mul(ir.Constant(i64, i), ldc))) for i in range(MR)
        ]
        a_rows = [builder.add(a0, builder.mul(ir.Constant(i64, i), rsa)) for i in range(MR)]
        undefined = ir.Constant(vector, ir.Undefined)
        spread = ir.Constant(ir.VectorType(i32, columns), [0] * columns)

        start = builder.block
        given, ready = builder.append_basic_block("given"), builder.append_basic_block("ready")
        body, after = builder.append_basic_block("step"), builder.append_basic_block("after")
        builder.cbranch(fresh, ready, given)
        builder.position_at_end(given)
        loaded = [builder.load(p, align=align) for p in c_rows]
        builder.branch(ready)
        builder.position_at_end(ready)
        zero = ir.Constant(i64, 0)
        initial = [builder.phi(vector) for _ in range(MR)]
        for phi, value in zip(initial, loaded):
            phi.add_incoming(ir.Constant(vector, None), start)
            phi.add_incoming(value, given)
        builder.cbranch(builder.icmp_signed("<", zero, depth), body, after)
        # One step of the depth a turn. The compiler takes more for a licence to load their elements of A
        # ahead of the products, more than there are registers, and the multiply-adds hide the turn anyway.
        builder.position_at_end(body)
        l = builder.phi(i64)
        accumulators = [builder.phi(vector) for _ in range(MR)]
        b = builder.load(vector_at(b_data, builder.add(b0, builder.mul(l, ldb))), align=align)
        a_step = builder.mul(l, csa)
        sums = []
        for row, accumulator in zip(a_rows, accumulators):
            a = builder.load(builder.gep(a_data, [builder.add(row, a_step)]))
            broadcast = builder.shuffle_vector(
                builder.insert_element(undefined, a, i32(0)), undefined, spread
            )
            sums.append(builder.call(muladd, [broadcast, b, accumulator]))
        following = builder.add(l, ir.Constant(i64, 1))
        l.add_incoming(zero, ready)
        l.add_incoming(following, body)
        for phi, before, value in zip(accumulators, initial, sums):
            phi.add_incoming(before, ready)
            phi.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("<", following, depth), body, after)
        builder.position_at_end(after)
        results = [builder.phi(vector) for _ in range(MR)]
        for phi, before, value in zip(results, initial, sums):
            phi.add_incoming(before, ready)
            phi.add_incoming(value, body)
        for pointer, value in zip(c_rows, results):
            builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    numbers = [types.int64] * 3
    return types.void(C, *numbers[:2], A, *numbers, B, *numbers, types.boolean), codegen


SQUARE = 8
"""Side of the blocks that are transposed in registers."""


@intrinsic
def transpose_block(typingctx, source, s0, lds, to, t0, ldt):
    """to[t0 + i*ldt + j] = source[s0 + j*lds + i] for a block of SQUARE x SQUARE."""
    element = source.dtype

    def codegen(context, builder, signature, args):
        _, s0, lds, _, t0, ldt = args
        i64, i32 = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(context.get_value_type(element), SQUARE)
        align = 4 if element == types.float32 else 8
        s_data, t_data = (
            cgutils.create_struct_proxy(signature.args[i])(context, builder, args[i]).data for i in (0, 3)
        )

        def pointer(data, start, stride, i):
            offset = builder.add(start, builder.mul(ir.Constant(i64, i), stride))
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        rows = [builder.load(pointer(s_data, s0, lds, i), align=align) for i in range(SQUARE)]
        half = SQUARE // 2
        masks = [
            ir.Constant(ir.VectorType(i32, SQUARE), [x for i in range(half) for x in (i + h, SQUARE + i + h)])
            for h in (0, half)
        ]
        # Interleaving each row with the one half the block away transposes it in log2(SQUARE) rounds.
        for _ in range(SQUARE.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in masks
            ]
        for i, row in enumerate(rows):
            builder.store(row, pointer(t_data, t0, ldt, i), align=align)
        return context.get_dummy_value()

    return types.void(source, *([types.int64] * 2), to, *([types.int64] * 2)), codegen


def padded(n: int, multiple: int) -> int:
    """``n`` rounded up to a multiple."""
    return -(-n // multiple) * multiple


@njit(nogil=True, cache=True, error_model="numpy")
def block_columns(C):
    """Columns of a block."""
    return NR if C.itemsize == 4 else NR // 2


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_add(C, c_row, A, a_row, transposed, B, rows, columns, depth, upper):
    """C[c_row:c_row+rows, :columns] += A[a_row:a_row+rows, :depth] @ B[:depth, :columns], or with A^T.

    All three are C-contiguous workspaces of one dtype whose rows (of C and A) and columns (of C and B) may
    be overrun up to the padding. With ``upper`` the blocks strictly below the diagonal are left out.
    """
    ldc, lda, ldb = C.shape[1], A.shape[1], B.shape[1]
    width = block_columns(C)
    rsa, csa = (1, lda) if transposed else (lda, 1)
    for j in range(0, columns, width):
        for i in range(0, rows, MR):
            if upper and i >= j + width:
                break
            a0 = (a_row + i) * rsa
            block(C, (c_row + i) * ldc + j, ldc, A, a0, rsa, csa, B, j, ldb, depth, False)
