"""The one loop over tiles of keys: softmax and Parallax, forward and decode, every estimator with a probe.

Source: docs/math.md, "One pass over the keys".
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .few_rows import accumulate_few, score_few
from .intrinsics import LANES, exp, exponentials, fetch_add, scale_to_maximum, shifted_products
from .microkernel import MR, block, block_columns
from .tiles import (
    KEY_STRIDE,
    KEY_TILE,
    all_finite,
    key_rows,
    read_keys,
    read_query_rows,
    stride,
    transpose,
    visible,
    workspace,
)

DOT, GAUSSIAN = 0, 1

# Functions that are called for every row or tile take whole arrays and places in them: a view would cost
# reference counts, which threads that share the array fight over.


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def score(S, A, KT, k_row, rows, head_dim, kernel, scale, first_columns, end_columns):
    """Log-weights of a tile, ``scale * q.k`` or ``-scale/2 |q - k|^2``: rows of A against columns of KT."""
    if kernel == GAUSSIAN:
        # Summed as squares of differences: expanding the square would cancel far from the origin.
        factor = scale * S.dtype.type(-0.5)
        for i in range(rows):
            s = S[i]
            s[:] = 0
            for d in range(head_dim):
                a, key = A[i, d], KT[k_row + d]
                for j in range(KEY_TILE):
                    difference = a - key[j]
                    s[j] += difference * difference
            scale_row(S, i, factor)
        return
    project(S, 0, A, KT, k_row, rows, head_dim, first_columns, end_columns)
    for i in range(rows):
        scale_row(S, i, scale)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def scale_row(S, i, factor):
    for j in range(KEY_TILE):
        S[i, j] *= factor


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def within(first, end, key, keys):
    """The keys ``first .. end`` of a row as columns of the tile that starts at ``key``."""
    f = min(max(first - key, 0), keys)
    return f, max(f, min(end - key, keys))


@njit(nogil=True, cache=True, error_model="numpy")
def every_column(S):
    """What :func:`reach` gives where every row sees all of a tile."""
    blocks = (S.shape[0] + MR - 1) // MR
    return np.zeros(blocks, np.int64), np.full(blocks, KEY_TILE, np.int64)


@njit(nogil=True, cache=True, error_model="numpy")
def reach(firsts, ends, rows, key, keys, first_columns, end_columns):
    """The columns of a tile that the rows of each block of MR see between them, none as ``keys .. keys``.

    Returns whether some row does not see all of the tile's keys.
    """
    partial = False
    for b in range((rows + MR - 1) // MR):
        low, high = keys, keys
        for i in range(b * MR, min(rows, b * MR + MR)):
            f, e = within(firsts[i], ends[i], key, keys)
            partial = partial or f > 0 or e < keys
            if e > f:
                high = max(high, e) if low < keys else e
                low = min(low, f)
        first_columns[b], end_columns[b] = low, high
    return partial


@njit(nogil=True, cache=True, error_model="numpy")
def project(S, first, A, KT, k_row, rows, head_dim, first_columns, end_columns):
    """S[first:][:rows] = A[first:][:rows] @ KT, but for the blocks of columns that no row of a block sees."""
    lds, lda, ldk = S.shape[1], A.shape[1], KT.shape[1]
    width = block_columns(S)
    for j in range(0, KEY_TILE, width):
        for b in range((rows + MR - 1) // MR):
            if first_columns[b] < j + width and end_columns[b] > j:
                row = first + b * MR
                block(S, row * lds + j, lds, A, row * lda, lda, 1, KT, k_row * ldk + j, ldk, head_dim, True)


@njit(nogil=True, cache=True, error_model="numpy")
def accumulate(O, first, S, V, v_row, rows, value_dim, first_columns, end_columns):
    """O[first:first+rows] += S[first:first+rows] @ V, over the columns of S that a block of rows sees."""
    ldo, lds, ldv = O.shape[1], S.shape[1], V.shape[1]
    for d in range(0, value_dim, block_columns(O)):
        for b in range((rows + MR - 1) // MR):
            row, low = first + b * MR, first_columns[b]
            block(
                O, row * ldo + d, ldo, S, row * lds + low, lds, 1, V, (v_row + low) * ldv + d, ldv,
                end_columns[b] - low, False,
            )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def hide(S, i, start, first, end, stop, value):
    """Everything of S[i, start:stop] but S[i, first:end] becomes ``value``."""
    for j in range(start, first):
        S[i, j] = value
    for j in range(end, stop):
        S[i, j] = value


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}, forceinline=True)
def row_dot(A, i, B, b, first, end):
    total = A.dtype.type(0)
    for j in range(first, end):
        total += A[i, j] * B[b, j]
    return total


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def multiply_row(O, i, factor, size):
    for d in range(size):
        O[i, d] *= factor


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def weigh_rows(
    S, O, rows, probes, firsts, ends, key, keys, first_columns, end_columns, scale, m, d1, d2, t0, shifted,
):  # fmt: skip
    """Scores of a tile become weights, every row's running sums move on to its new maximum.

    ``probes``: the first row of the probe scores in S and of O2 in O, or 0 without a probe; the scores become
    weights times shifted probe scores. What a row does not see of its block's columns gets the weight 0.
    """
    none = S.dtype.type(-np.inf)
    zero, one = S.dtype.type(0), S.dtype.type(1)
    for i in range(rows):
        # Whole vectors; their excess columns are hidden with the rest.
        start = first_columns[i // MR] // LANES * LANES
        stop = (end_columns[i // MR] + LANES - 1) // LANES * LANES
        if first_columns[i // MR] == end_columns[i // MR]:
            continue
        t_row, at, count = probes + i, i * KEY_STRIDE + start, stop - start
        f, e = within(firsts[i], ends[i], key, keys)
        factor = scale
        if e - f < count:
            for j in range(f, e):
                S[i, j] *= scale
            factor = one
            hide(S, i, start, f, e, stop, none)
            if probes > 0:
                # A hidden probe score may be NaN, which a weight of 0 would not silence.
                hide(S, t_row, start, f, e, stop, zero)
        # Scaled here and not with the queries: gradients and slopes, which take the same products times the
        # same scale, then find the very scores that the maximum and the normaliser are of.
        largest = scale_to_maximum(S, at, count, factor)
        if largest > m[i]:
            correction = exp(m[i] - largest)
            d1[i] *= correction
            d2[i] *= correction
            multiply_row(O, i, correction, O.shape[1])
            if probes > 0:
                multiply_row(O, t_row, correction, O.shape[1])
            m[i] = largest
        # Scores that are all -inf so far weigh nothing; against their own maximum they would be NaN.
        weight = exponentials(S, at, count, m[i] if m[i] != none else zero)
        d1[i] += weight
        if probes > 0:
            # Keys with a large common component make the probe scores large and nearly constant, and the
            # output then a difference of large numbers: they are kept relative to the first tile's
            # weighted mean.
            if not shifted[i] and weight != 0:
                t0[i] = row_dot(S, i, S, t_row, start, stop) / weight
                shifted[i] = True
            d2[i] += shifted_products(S, at, t_row * KEY_STRIDE + start, count, t0[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def accumulate_visible(O, o_row, S, s_row, V, v_row, first, end, value_dim):
    """O[o_row] += S[s_row, first:end] @ V[v_row:][first:end].

    For tiles that are not finite: a hidden NaN must not be multiplied by a weight of 0.
    """
    for j in range(first, end):
        weight = S[s_row, j]
        for d in range(value_dim):
            O[o_row, d] += weight * V[v_row + j, d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def finish_row(out, b, query, h, O, i, t_row, d1, d2, t0, rq, intercept, amplification, value_dim):
    """Output of one row from its sums, for every member of the family; ``t_row`` is 0 without a probe."""
    one = O.dtype.type(1)
    if t_row == 0:
        for d in range(value_dim):
            out[b, query, h, d] = O[i, d] / d1
        return
    if not intercept:
        for d in range(value_dim):
            out[b, query, h, d] = -(O[t_row, d] + t0 * O[i, d]) / d1
        return
    c = d2 / d1
    if amplification:
        factor = one / (one - (t0 + c - rq))
        for d in range(value_dim):
            vbar = O[i, d] / d1
            out[b, query, h, d] = vbar - factor * (O[t_row, d] / d1 - c * vbar)
        return
    for d in range(value_dim):
        out[b, query, h, d] = (one + c) * (O[i, d] / d1) - O[t_row, d] / d1


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
    probed = tensors[3, 0] != 0
    packed = finite_packed.size > 0
    most = (tile_rows + MR - 1) // MR * MR
    stacked = most * 2 if probed else most
    A = workspace(stacked, stride(head_dim), dtype)
    S = workspace(stacked, KEY_STRIDE, dtype)
    O = workspace(stacked, stride(value_dim), dtype)
    K = workspace(KEY_TILE, stride(head_dim), dtype)
    KT = keys_packed if packed else workspace(K.shape[1], KEY_STRIDE, dtype)
    V = values_packed if packed else workspace(KEY_TILE, O.shape[1], dtype)
    k_row, v_row = 0, 0
    m, d1, d2 = np.empty(tile_rows, dtype), np.empty(tile_rows, dtype), np.empty(tile_rows, dtype)
    t0, rq = np.empty(tile_rows, dtype), np.zeros(tile_rows, dtype)
    shifted = np.empty(tile_rows, np.bool_)
    firsts, ends = np.empty(tile_rows, np.int64), np.empty(tile_rows, np.int64)
    first_columns, end_columns = every_column(S)
    while True:
        taken = fetch_add(counter)
        if taken >= items.shape[0]:
            break
        sequence, head, row = sequences[items[taken, 0]], items[taken, 1], items[taken, 2]
        each, split = items[taken, 3] - row, items[taken, 6]
        rows = heads * each
        # Probes begin a block of the microkernel, so that it sees what the same block of queries sees.
        probes = 0 if not probed else (rows if few else (rows + MR - 1) // MR * MR)
        for h in range(heads):
            read_query_rows(tensors[0], sequence, head + h, group, row, each, head_dim, A, h * each)
            if probed:
                read_query_rows(
                    tensors[3], sequence, head + h, group, row, each, head_dim, A, probes + h * each
                )
        if amplification:
            for i in range(rows):
                rq[i] = row_dot(A, i, A, probes + i, 0, head_dim)
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
            partial = reach(firsts, ends, rows, key, keys, first_columns, end_columns)
            if few:
                # Arithmetic keeps the processor from reading ahead, so it asks for what is read next, line by
                # line as it consumes what is there: the values of these keys here, the next keys below.
                score_few(
                    S, A, heads, each, probed, tensors[1], sequence, page_table, page_size, head, key, keys,
                    head_dim, tensors[2], key, end - 1,
                )  # fmt: skip
            elif packed:
                tile = tiles_from[items[taken, 0]] + (key - sequence[3]) // KEY_TILE
                k_row = (head * finite_packed.shape[1] + tile) * key_rows(head_dim)
                v_row = (head * finite_packed.shape[1] + tile) * KEY_TILE
            else:
                read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, K, 0)
                transpose(K, head_dim, KT, 0)
                read_keys(tensors[2], sequence, page_table, page_size, head, key, keys, value_dim, V, 0)
            if not few:
                if kernel == DOT:
                    project(S, 0, A, KT, k_row, rows, head_dim, first_columns, end_columns)
                else:
                    score(S, A, KT, k_row, rows, head_dim, kernel, scale, first_columns, end_columns)
                if probed:
                    project(S, probes, A, KT, k_row, rows, head_dim, first_columns, end_columns)
            weigh_rows(
                S, O, rows, probes, firsts, ends, key, keys, first_columns, end_columns,
                scale if kernel == DOT else dtype.type(1), m, d1, d2, t0, shifted,
            )  # fmt: skip
            if few:
                accumulate_few(
                    O, S, heads, each, probed, firsts, ends, tensors[2], sequence, page_table, page_size,
                    head, key, keys, value_dim, tensors[1], key + KEY_TILE, end - 1,
                )  # fmt: skip
            elif partial and not (finite_packed[head, tile] if packed else all_finite(V, 0, keys, value_dim)):
                for i in range(rows):
                    f, e = within(firsts[i], ends[i], key, keys)
                    accumulate_visible(O, i, S, i, V, v_row, f, e, value_dim)
                    if probed:
                        accumulate_visible(O, probes + i, S, probes + i, V, v_row, f, e, value_dim)
            else:
                accumulate(O, 0, S, V, v_row, rows, value_dim, first_columns, end_columns)
                if probed:
                    accumulate(O, probes, S, V, v_row, rows, value_dim, first_columns, end_columns)
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
                        O2_out[split, b, query, query_head, d] = O[probes + i, d]
            if out.size > 0:
                if ends[i] <= firsts[i]:
                    out[b, query, query_head, :] = 0
                else:
                    finish_row(
                        out, b, query, query_head, O, i, probes + i if probed else 0,
                        d1[i], d2[i], t0[i], rq[i], intercept, amplification, value_dim,
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
