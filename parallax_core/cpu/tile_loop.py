"""The one loop over tiles of keys: softmax and Parallax, forward and decode, every estimator with a probe.

Source: docs/math.md, "One pass over the keys".
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .few_rows import accumulate_few, score_few
from .intrinsics import exp, fetch_add, maximum, total
from .microkernel import MR, multiply_add
from .tiles import (
    KEY_STRIDE,
    KEY_TILE,
    all_finite,
    read_keys,
    read_query_rows,
    stride,
    transpose,
    visible,
)

DOT, GAUSSIAN = 0, 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def score(S, A, KT, rows, head_dim, kernel, scale):
    """Log-weights of a tile, ``scale * q.k`` or ``-scale/2 |q - k|^2``: rows of A against columns of KT."""
    if kernel == GAUSSIAN:
        # Summed as squares of differences: expanding the square would cancel far from the origin.
        factor = scale * S.dtype.type(-0.5)
        for i in range(rows):
            s = S[i]
            s[:] = 0
            for d in range(head_dim):
                a, key = A[i, d], KT[d]
                for j in range(KEY_TILE):
                    difference = a - key[j]
                    s[j] += difference * difference
            scale_row(S, i, factor)
        return
    project(S, 0, A, KT, rows, head_dim)
    for i in range(rows):
        scale_row(S, i, scale)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def scale_row(S, i, factor):
    for j in range(KEY_TILE):
        S[i, j] *= factor


@njit(nogil=True, cache=True, error_model="numpy")
def project(S, first, A, KT, rows, head_dim):
    """S[first:first+rows] = A[first:first+rows] @ KT."""
    S[first : first + (rows + MR - 1) // MR * MR, :] = 0
    multiply_add(S, first, A, first, False, KT, rows, KEY_TILE, head_dim, False)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def within(first, end, key, keys):
    """The keys ``first .. end`` of a row as columns of the tile that starts at ``key``."""
    f = min(max(first - key, 0), keys)
    return f, max(f, min(end - key, keys))


# The functions of one row run over all of a tile's columns, a constant: that is what lets them vectorise.
# What a row does not see has been set to values that leave no trace. They take the tile and the row's
# number, since a view would cost as much in reference counts as the row's arithmetic.


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def hide(S, i, first, end, value):
    """Everything of S[i] but S[i, first:end] becomes ``value``."""
    for j in range(first):
        S[i, j] = value
    for j in range(end, KEY_TILE):
        S[i, j] = value


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def exponentials(S, i, m):
    """S[i] becomes exp(S[i] - m)."""
    for j in range(KEY_TILE):
        S[i, j] = exp(S[i, j] - m)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}, forceinline=True)
def row_dot(A, i, B, b, size):
    total = A.dtype.type(0)
    for j in range(size):
        total += A[i, j] * B[b, j]
    return total


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def shifted_product(S, t_row, i, shift):
    """S[t_row] becomes S[i] * (S[t_row] - shift)."""
    for j in range(KEY_TILE):
        S[t_row, j] = S[i, j] * (S[t_row, j] - shift)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def multiply_row(O, i, factor):
    for d in range(O.shape[1]):
        O[i, d] *= factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, forceinline=True)
def weigh_row(S, O, i, t_row, first, end, m, d1, d2, t0, shifted):
    """Scores of row ``i`` become weights, its running sums move on to the new maximum.

    ``t_row`` is the row of the probe scores in S and of O2 in O, or -1; it becomes weights times shifted
    probe scores. Columns outside ``first .. end`` get the weight 0.
    """
    if end - first < KEY_TILE:
        hide(S, i, first, end, -np.inf)
        if t_row >= 0:
            # A hidden probe score may be NaN, which a weight of 0 would not silence.
            hide(S, t_row, first, end, 0.0)
    largest = maximum(S, i * KEY_STRIDE, KEY_TILE)
    if largest > m[i]:
        correction = exp(m[i] - largest)
        d1[i] *= correction
        d2[i] *= correction
        multiply_row(O, i, correction)
        if t_row >= 0:
            multiply_row(O, t_row, correction)
        m[i] = largest
    # Scores that are all -inf so far weigh nothing; against their own maximum they would be NaN.
    exponentials(S, i, m[i] if m[i] != -np.inf else m.dtype.type(0))
    weight = total(S, i * KEY_STRIDE, KEY_TILE)
    d1[i] += weight
    if t_row < 0:
        return
    # Keys with a large common component make the probe scores large and nearly constant, and the output
    # then a difference of large numbers: they are kept relative to the first tile's weighted mean.
    if not shifted[i] and weight != 0:
        t0[i] = row_dot(S, i, S, t_row, KEY_TILE) / weight
        shifted[i] = True
    shifted_product(S, t_row, i, t0[i])
    d2[i] += total(S, t_row * KEY_STRIDE, KEY_TILE)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def accumulate_visible(o, s, V, first, end, value_dim):
    """o += s[first:end] @ V[first:end]: a hidden NaN must not be multiplied by a weight of 0."""
    for j in range(first, end):
        weight, v = s[j], V[j]
        for d in range(value_dim):
            o[d] += weight * v[d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def finish_row(out, O, i, t_row, d1, d2, t0, rq, intercept, amplification, value_dim):
    """Output of one row from its sums, for every member of the family."""
    if t_row < 0:
        for d in range(value_dim):
            out[d] = O[i, d] / d1
        return
    if not intercept:
        for d in range(value_dim):
            out[d] = -(O[t_row, d] + t0 * O[i, d]) / d1
        return
    one = O.dtype.type(1)
    c = d2 / d1
    if amplification:
        factor = one / (one - (t0 + c - rq))
        for d in range(value_dim):
            vbar = O[i, d] / d1
            out[d] = vbar - factor * (O[t_row, d] / d1 - c * vbar)
        return
    for d in range(value_dim):
        out[d] = (one + c) * (O[i, d] / d1) - O[t_row, d] / d1


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def attend(
    counter, items, sequences, tensors, page_table, page_size, tile_rows, head_dim, value_dim, group, heads,
    few, causal, window, kernel, scale, intercept, amplification, tiles_from, keys_packed, values_packed,
    finite_packed, out, m_out, d1_out, d2_out, t0_out, O1_out, O2_out,
):  # fmt: skip
    """Take items of work until none is left.

    items: ``(n, 7)`` int64: sequence, first of its ``heads`` key heads, first row and the one after the last
    (the rows of a key head are its query heads' interleaved), first key and the one after the last, index of
    the split. tile_rows: the most rows of an item, all heads together. few: take the way for a few rows a
    head, the only one for several heads at a time. tiles_from, ``*_packed``: what :func:`tiles.pack` takes
    and writes, or of size 0. out: ``(B, Lq, Hq, Dv)``, or of size 0 where only states are wanted; the states:
    ``(splits, B, Lq, Hq[, Dv])``, or of size 0. All are of one dtype, in which everything is accumulated.
    """
    dtype = m_out.dtype
    zero = dtype.type(0)
    probed = tensors[3, 0] != 0
    packed = keys_packed.size > 0
    stacked = tile_rows * 2 if probed else tile_rows
    # A microkernel's last block may overrun the rows in use.
    A = np.zeros((stacked + MR, stride(head_dim)), dtype)
    S = np.zeros((stacked + MR, KEY_STRIDE), dtype)
    O = np.zeros((stacked + MR, stride(value_dim)), dtype)
    K = np.zeros((KEY_TILE, stride(head_dim)), dtype)
    KT = np.zeros((K.shape[1], KEY_STRIDE), dtype)
    V = np.zeros((KEY_TILE, O.shape[1]), dtype)
    m, d1, d2 = np.empty(tile_rows, dtype), np.empty(tile_rows, dtype), np.empty(tile_rows, dtype)
    t0, shifted = np.empty(tile_rows, dtype), np.empty(tile_rows, np.bool_)
    firsts, ends = np.empty(tile_rows, np.int64), np.empty(tile_rows, np.int64)
    while True:
        taken = fetch_add(counter)
        if taken >= items.shape[0]:
            break
        sequence, head, row = sequences[items[taken, 0]], items[taken, 1], items[taken, 2]
        each, split = items[taken, 3] - row, items[taken, 6]
        rows = heads * each
        for h in range(heads):
            read_query_rows(tensors[0], sequence, head + h, group, row, each, head_dim, A, h * each)
            if probed:
                read_query_rows(
                    tensors[3], sequence, head + h, group, row, each, head_dim, A, rows + h * each
                )
        stack = rows * 2 if probed else rows
        begin, end = items[taken, 5], items[taken, 4]
        for i in range(rows):
            f, e = visible(sequence, (row + i % each) // group, causal, window)
            firsts[i] = max(f, items[taken, 4])
            ends[i] = max(firsts[i], min(e, items[taken, 5]))
            if ends[i] > firsts[i]:
                begin, end = min(begin, firsts[i]), max(end, ends[i])
        m[:], d1[:], d2[:], t0[:] = -np.inf, 0, 0, 0
        shifted[:] = False
        O[:] = 0
        if packed:
            begin -= (begin - sequence[3]) % KEY_TILE
        tile = 0
        for key in range(begin, end, KEY_TILE):
            keys = min(KEY_TILE, end - key)
            if few:
                score_few(
                    S, A, heads, each, probed, tensors[1], sequence, page_table, page_size, head, key, keys,
                    head_dim,
                )  # fmt: skip
            elif packed:
                tile = tiles_from[items[taken, 0]] + (key - sequence[3]) // KEY_TILE
                KT, V = keys_packed[head, tile], values_packed[head, tile]
            else:
                read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, K)
                transpose(K, head_dim, KT)
                read_keys(tensors[2], sequence, page_table, page_size, head, key, keys, value_dim, V)
            if few or (kernel == DOT and probed):
                if not few:
                    # Queries and probes are rows of one product.
                    project(S, 0, A, KT, stack, head_dim)
                for i in range(rows):
                    scale_row(S, i, scale)
            else:
                if probed:
                    project(S, rows, A, KT, rows, head_dim)
                score(S, A, KT, rows, head_dim, kernel, scale)
            partial = False
            for i in range(rows):
                f, e = within(firsts[i], ends[i], key, keys)
                partial = partial or f > 0 or e < keys
                weigh_row(S, O, i, rows + i if probed else -1, f, e, m, d1, d2, t0, shifted)
            if few:
                accumulate_few(
                    O, S, heads, each, probed, firsts, ends, tensors[2], sequence, page_table, page_size,
                    head, key, keys, value_dim,
                )  # fmt: skip
            elif partial and not (finite_packed[head, tile] if packed else all_finite(V, keys, value_dim)):
                for i in range(rows):
                    f, e = within(firsts[i], ends[i], key, keys)
                    accumulate_visible(O[i], S[i], V, f, e, value_dim)
                    if probed:
                        accumulate_visible(O[rows + i], S[rows + i], V, f, e, value_dim)
            else:
                multiply_add(O, 0, S, 0, False, V, stack, value_dim, keys, False)
        for i in range(rows):
            b, query = sequence[0], sequence[1] + (row + i % each) // group
            query_head = (head + i // each) * group + (row + i % each) % group
            if m[i] == -np.inf and ends[i] > firsts[i]:
                d1[i] = np.nan
            if m_out.size > 0:
                m_out[split, b, query, query_head] = m[i]
                d1_out[split, b, query, query_head] = d1[i]
                for d in range(value_dim):
                    O1_out[split, b, query, query_head, d] = O[i, d]
                if probed:
                    d2_out[split, b, query, query_head] = d2[i]
                    t0_out[split, b, query, query_head] = t0[i]
                    for d in range(value_dim):
                        O2_out[split, b, query, query_head, d] = O[rows + i, d]
            if out.size > 0:
                if ends[i] <= firsts[i]:
                    out[b, query, query_head, :] = 0
                else:
                    rq = row_dot(A, i, A, rows + i, head_dim) if probed else zero
                    finish_row(
                        out[b, query, query_head], O, i, rows + i if probed else -1,
                        d1[i], d2[i], t0[i], rq, intercept, amplification, value_dim,
                    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def merge_splits(m, d1, d2, t0, O1, O2, out):
    """Merge the states of all splits into the first one, in order, and write the output.

    Empty splits are passed over. Shapes as in :func:`attend`; d2, t0 and O2 are of size 0 without a probe.
    """
    probed = d2.size > 0
    splits, batch, length, heads = m.shape
    value_dim = O1.shape[4]
    one = m.dtype.type(1)
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                at = -1
                for s in range(splits):
                    if m[s, b, i, h] == -np.inf and not np.isnan(d1[s, b, i, h]):
                        continue
                    if at >= 0 and m[s, b, i, h] == -np.inf and m[0, b, i, h] != -np.inf:
                        continue
                    # A split whose scores are all -inf counts for nothing beside one with a finite maximum.
                    if at < 0 or (m[0, b, i, h] == -np.inf and m[s, b, i, h] != -np.inf):
                        m[0, b, i, h], d1[0, b, i, h] = m[s, b, i, h], d1[s, b, i, h]
                        O1[0, b, i, h] = O1[s, b, i, h]
                        if probed:
                            d2[0, b, i, h], t0[0, b, i, h] = d2[s, b, i, h], t0[s, b, i, h]
                            O2[0, b, i, h] = O2[s, b, i, h]
                        at = s
                        continue
                    largest = max(m[0, b, i, h], m[s, b, i, h])
                    fa = exp(m[0, b, i, h] - largest) if m[0, b, i, h] != largest else one
                    fb = exp(m[s, b, i, h] - largest) if m[s, b, i, h] != largest else one
                    if probed:
                        step = t0[s, b, i, h] - t0[0, b, i, h]
                        d2[0, b, i, h] = fa * d2[0, b, i, h] + fb * (d2[s, b, i, h] + step * d1[s, b, i, h])
                        for d in range(value_dim):
                            moved = O2[s, b, i, h, d] + step * O1[s, b, i, h, d]
                            O2[0, b, i, h, d] = fa * O2[0, b, i, h, d] + fb * moved
                    m[0, b, i, h] = largest
                    d1[0, b, i, h] = fa * d1[0, b, i, h] + fb * d1[s, b, i, h]
                    for d in range(value_dim):
                        O1[0, b, i, h, d] = fa * O1[0, b, i, h, d] + fb * O1[s, b, i, h, d]
                for d in range(value_dim):
                    if at < 0:
                        out[b, i, h, d] = 0
                        continue
                    vbar = O1[0, b, i, h, d] / d1[0, b, i, h]
                    if probed:
                        c = d2[0, b, i, h] / d1[0, b, i, h]
                        out[b, i, h, d] = (one + c) * vbar - O2[0, b, i, h, d] / d1[0, b, i, h]
                    else:
                        out[b, i, h, d] = vbar
