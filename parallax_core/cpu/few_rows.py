"""A tile of keys against a few rows of queries, straight from memory: decoding is bound by reading the cache.

A microkernel would be mostly padding here, and copying and transposing the tile cost more than the product.
"""

from __future__ import annotations

from numba import njit

from .intrinsics import BF16, F16, F32, F64, prefetch_to_second
from .streamed_products import ACCUMULATORS, VECTOR_BYTES, accumulate_block, score_block

MOST_ROWS = 4
"""Rows of queries a key head up to which this way is taken."""
BLOCK = 4
"""Keys that share a pass over the heads: few enough that the reading stays nearly sequential, enough that
queries and sums are not loaded anew for every key."""
TWO_QUERIES = ACCUMULATORS >= 4 * BLOCK
"""Whether two queries and their probes fit the registers beside one block."""
PAIR_VECTORS = ACCUMULATORS // 2
"""Vectors of a value whose sums for two rows fit the registers."""
QUAD_VECTORS = ACCUMULATORS // 4
"""The same for four rows."""


@njit(nogil=True, cache=True, error_model="numpy")
def row_base(tensor, sequence, page_table, page_size, head, position):
    """Index of the first element of a position's row."""
    a, b = sequence[0], position
    if page_size > 0:
        a, b = page_table[a, b // page_size], b % page_size
    return a * tensor[1] + b * tensor[2] + head * tensor[3]


@njit(nogil=True, cache=True, error_model="numpy")
def run_length(page_size, position, keys):
    """How many of ``keys`` positions from this one on lie at equal distances in memory."""
    return keys if page_size == 0 else min(keys, page_size - position % page_size)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def ask(address, stride, keys, size):
    """Ask for ``size`` bytes of each of some keys ``stride`` bytes apart."""
    for l in range(keys):
        for line in range(0, size, 64):
            prefetch_to_second(address + l * stride + line)


def _functions(code):
    item = {F64: 8, F32: 4}.get(code, 2)

    """The products and the weighted sums of a run of equally spaced keys of one storage type, a constant."""

    @njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
    def score_rows(S, j, A, rows, address, base, stride, keys, size):
        if keys == BLOCK:
            score_block(S, j, A, rows, code, address, base, stride, BLOCK, size)
        else:
            for l in range(keys):
                score_block(S, j + l, A, rows, code, address, base + l * stride, stride, 1, size)

    @njit(nogil=True, cache=True, error_model="numpy")
    def score_run(S, A, heads, each, probed, size, tensor, base, j, keys, other, other_base):
        address, stride, rows = tensor[0], tensor[2], heads * each
        for l in range(0, keys, BLOCK):
            block = min(BLOCK, keys - l)
            for h in range(heads):
                at = base + l * stride + h * tensor[3]
                there = other_base + l * other[2] + h * other[3]
                ask(other[0] + there * item, other[2] * item, block, size * item)
                i, end = h * each, (h + 1) * each
                while i < end:
                    if probed and TWO_QUERIES and i + 2 <= end:
                        score_rows(
                            S, j + l, A, (i, i + 1, rows + i, rows + i + 1), address, at, stride, block, size
                        )
                        i += 2
                    elif probed:
                        score_rows(S, j + l, A, (i, rows + i), address, at, stride, block, size)
                        i += 1
                    elif i + 2 <= end:
                        score_rows(S, j + l, A, (i, i + 1), address, at, stride, block, size)
                        i += 2
                    else:
                        score_rows(S, j + l, A, (i,), address, at, stride, block, size)
                        i += 1

    @njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
    def accumulate_rows(O, S, rows, address, base, stride, j, keys, size):
        lanes = VECTOR_BYTES // O.itemsize
        d = 0
        if len(rows) == 4:
            while d + QUAD_VECTORS * lanes <= size:
                accumulate_block(O, d, S, j, rows, code, address, base, stride, keys, QUAD_VECTORS, 0)
                d += QUAD_VECTORS * lanes
        else:
            while d + PAIR_VECTORS * lanes <= size:
                accumulate_block(O, d, S, j, rows, code, address, base, stride, keys, PAIR_VECTORS, 0)
                d += PAIR_VECTORS * lanes
        while d + lanes <= size:
            accumulate_block(O, d, S, j, rows, code, address, base, stride, keys, 1, 0)
            d += lanes
        if d < size:
            accumulate_block(O, d, S, j, rows, code, address, base, stride, keys, 0, size - d)

    @njit(nogil=True, cache=True, error_model="numpy")
    def accumulate_run(
        O, S, heads, each, probed, firsts, ends, key, size, tensor, base, j, keys, other, other_base
    ):  # fmt: skip
        address, stride, rows = tensor[0], tensor[2], heads * each
        for l in range(0, keys, BLOCK):
            for h in range(heads):
                at = base + l * stride + h * tensor[3]
                there = other_base + l * other[2] + h * other[3]
                ask(other[0] + there * item, other[2] * item, min(BLOCK, keys - l), size * item)
                i, end = h * each, (h + 1) * each
                while i < end:
                    f = max(firsts[i] - key, j + l)
                    e = min(ends[i] - key, j + min(l + BLOCK, keys))
                    together = i + 2 <= end and firsts[i] == firsts[i + 1] and ends[i] == ends[i + 1]
                    first = at + (f - j - l) * stride
                    if probed and TWO_QUERIES and together:
                        accumulate_rows(
                            O, S, (i, i + 1, rows + i, rows + i + 1), address, first, stride, f, e - f, size
                        )
                        i += 2
                    elif probed:
                        accumulate_rows(O, S, (i, rows + i), address, first, stride, f, e - f, size)
                        i += 1
                    elif together:
                        accumulate_rows(O, S, (i, i + 1), address, first, stride, f, e - f, size)
                        i += 2
                    else:
                        accumulate_rows(O, S, (i,), address, first, stride, f, e - f, size)
                        i += 1

    return score_run, accumulate_run


def _walk(run_f64, run_f32, run_bf16, run_f16):
    @njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
    def walk(tensor, sequence, page_table, page_size, head, key, keys, other, next_key, last, arguments):
        """Do ``keys`` positions from ``key`` on, a run of equal distances at a time, in their storage type.

        other: what is read next, from position ``next_key`` on; last: the last position that may be looked
        up.
        """
        code, j = tensor[4], 0
        while j < keys:
            base = row_base(tensor, sequence, page_table, page_size, head, key + j)
            run = run_length(page_size, key + j, keys - j)
            # A position that the sequence holds: a page beyond its last is never looked up.
            following = min(next_key + j, last)
            there = row_base(other, sequence, page_table, page_size, head, following)
            if code == F32:
                run_f32(*arguments, tensor, base, j, run, other, there)
            elif code == F64:
                run_f64(*arguments, tensor, base, j, run, other, there)
            elif code == BF16:
                run_bf16(*arguments, tensor, base, j, run, other, there)
            else:
                run_f16(*arguments, tensor, base, j, run, other, there)
            j += run

    return walk


_walk_keys, _walk_values = (
    _walk(*runs) for runs in zip(*(_functions(code) for code in (F64, F32, BF16, F16)))
)


@njit(nogil=True, cache=True, error_model="numpy")
def score_few(
    S, A, heads, each, probed, tensor, sequence, page_table, page_size, head, key, keys, size, other,
    next_key, last,
):  # fmt: skip
    """S[i, j] = A[i] . key j of the row's head, ``each`` rows a head, the probes' after all of the queries'.

    All heads of a position are read together, since they are neighbours in memory. other: what is read next,
    from position ``next_key`` on; last: the last position that may be looked up.
    """
    _walk_keys(
        tensor, sequence, page_table, page_size, head, key, keys, other, next_key, last,
        (S, A, heads, each, probed, size),
    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def accumulate_few(
    O, S, heads, each, probed, firsts, ends, tensor, sequence, page_table, page_size, head, key, keys, size,
    other, next_key, last,
):  # fmt: skip
    """O[i] += S[i] @ values, each row over the keys it sees alone: a hidden NaN is never multiplied.

    firsts, ends: of the rows of queries, in whose order the probes' rows follow. other, next_key, last: as in
    :func:`score_few`.
    """
    _walk_values(
        tensor, sequence, page_table, page_size, head, key, keys, other, next_key, last,
        (O, S, heads, each, probed, firsts, ends, key, size),
    )  # fmt: skip
