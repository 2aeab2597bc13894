"""A tile of keys against a few rows of queries, straight from memory: decoding is bound by reading the cache.

A microkernel would be mostly padding here, and copying and transposing the tile cost more than the product.
"""

from __future__ import annotations

from numba import njit

from .intrinsics import BF16, F32, F64, load_bf16, load_f16, load_f32, load_f64, prefetch

MOST_ROWS = 4
"""Rows of queries a key head up to which this way is taken."""
AHEAD = 12
"""Keys between the one at hand and the one asked for: each lies in a page of its own, where the processor's
own prefetcher starts anew."""


@njit(nogil=True, cache=True, error_model="numpy")
def row_base(tensor, sequence, page_table, page_size, head, position):
    """Index of the first element of a position's row."""
    a, b = sequence[0], position
    if page_size > 0:
        a, b = page_table[a, b // page_size], b % page_size
    return a * tensor[1] + b * tensor[2] + head * tensor[3]


@njit(nogil=True, cache=True, error_model="numpy")
def ask_for(tensor, base, size):
    itemsize = 8 if tensor[4] == F64 else (4 if tensor[4] == F32 else 2)
    for line in range(0, size * itemsize, 64):
        prefetch(tensor[0] + base * itemsize + line)


def _functions(load):
    """The product of a row in memory with a row of a workspace, and the sum of four such rows, weighted."""

    @njit(
        nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}, forceinline=True
    )
    def product(address, base, A, i, size):
        total = A.dtype.type(0)
        for d in range(size):
            total += load(address, base + d) * A[i, d]
        return total

    @njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, forceinline=True)
    def add(O, i, address, b0, w0, b1, w1, b2, w2, b3, w3, size):
        for d in range(size):
            first = w0 * load(address, b0 + d) + w1 * load(address, b1 + d)
            O[i, d] += first + (w2 * load(address, b2 + d) + w3 * load(address, b3 + d))

    @njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, forceinline=True)
    def add_one(O, i, address, b0, w0, size):
        for d in range(size):
            O[i, d] += w0 * load(address, b0 + d)

    return product, add, add_one


_product_f64, _add_f64, _add_one_f64 = _functions(load_f64)
_product_f32, _add_f32, _add_one_f32 = _functions(load_f32)
_product_bf16, _add_bf16, _add_one_bf16 = _functions(load_bf16)
_product_f16, _add_f16, _add_one_f16 = _functions(load_f16)


@njit(nogil=True, cache=True, error_model="numpy")
def score_few(
    S, A, heads, each, probed, tensor, sequence, page_table, page_size, head, key, keys, end, size
):  # fmt: skip
    """S[i, j] = A[i] . key j of the row's head, ``each`` rows a head, the probes' after all of the queries'.

    Keys up to ``end`` are asked for in advance. All heads of a position are read together, since they are
    neighbours in memory.
    """
    address, code, rows = tensor[0], tensor[4], heads * each
    for j in range(keys):
        for h in range(heads):
            base = row_base(tensor, sequence, page_table, page_size, head + h, key + j)
            if key + j + AHEAD < end:
                ahead = row_base(tensor, sequence, page_table, page_size, head + h, key + j + AHEAD)
                ask_for(tensor, ahead, size)
            for part in range(2 if probed else 1):
                for i in range(part * rows + h * each, part * rows + (h + 1) * each):
                    if code == F32:
                        S[i, j] = _product_f32(address, base, A, i, size)
                    elif code == F64:
                        S[i, j] = _product_f64(address, base, A, i, size)
                    elif code == BF16:
                        S[i, j] = _product_bf16(address, base, A, i, size)
                    else:
                        S[i, j] = _product_f16(address, base, A, i, size)


@njit(nogil=True, cache=True, error_model="numpy")
def accumulate_few(
    O, S, heads, each, probed, firsts, ends, tensor, sequence, page_table, page_size, head, key, keys, end,
    size,
):  # fmt: skip
    """O[i] += S[i] @ values, each row over the keys it sees alone: a hidden NaN is never multiplied.

    firsts, ends: of the rows of queries, in whose order the probes' rows follow.
    """
    address, code, rows = tensor[0], tensor[4], heads * each
    j = 0
    while j < keys:
        step = 4 if j + 4 <= keys else 1
        for h in range(heads):
            b0 = row_base(tensor, sequence, page_table, page_size, head + h, key + j)
            b1, b2, b3 = b0, b0, b0
            if step == 4:
                b1 = row_base(tensor, sequence, page_table, page_size, head + h, key + j + 1)
                b2 = row_base(tensor, sequence, page_table, page_size, head + h, key + j + 2)
                b3 = row_base(tensor, sequence, page_table, page_size, head + h, key + j + 3)
            for ahead in range(key + j + AHEAD, min(key + j + AHEAD + step, end)):
                ask_for(tensor, row_base(tensor, sequence, page_table, page_size, head + h, ahead), size)
            for n in range(each * (2 if probed else 1)):
                i = (n // each) * rows + h * each + n % each
                f, e = firsts[i % rows] - key, ends[i % rows] - key
                if step == 4 and j >= f and j + 4 <= e:
                    w0, w1, w2, w3 = S[i, j], S[i, j + 1], S[i, j + 2], S[i, j + 3]
                    if code == F32:
                        _add_f32(O, i, address, b0, w0, b1, w1, b2, w2, b3, w3, size)
                    elif code == F64:
                        _add_f64(O, i, address, b0, w0, b1, w1, b2, w2, b3, w3, size)
                    elif code == BF16:
                        _add_bf16(O, i, address, b0, w0, b1, w1, b2, w2, b3, w3, size)
                    else:
                        _add_f16(O, i, address, b0, w0, b1, w1, b2, w2, b3, w3, size)
                    continue
                for l in range(max(j, f), min(j + step, e)):
                    base = b0 if l == j else (b1 if l == j + 1 else (b2 if l == j + 2 else b3))
                    if code == F32:
                        _add_one_f32(O, i, address, base, S[i, l], size)
                    elif code == F64:
                        _add_one_f64(O, i, address, base, S[i, l], size)
                    elif code == BF16:
                        _add_one_bf16(O, i, address, base, S[i, l], size)
                    else:
                        _add_one_f16(O, i, address, base, S[i, l], size)
        j += step
