"""The one loop over tiles of keys: softmax and Parallax, forward and decode, every estimator with a probe.

Source: docs/math.md, "One pass over the keys".
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .intrinsics import exp, fetch_add
from .microkernel import MR, NR, multiply_add
from .tiles import KEY_TILE, all_finite, read_keys, read_query_rows, visible

DOT, GAUSSIAN = 0, 1


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def score(S, A, KT, rows, keys, head_dim, kernel, scale):
    """Log-weights of a tile, ``scale * q.k`` or ``-scale/2 |q - k|^2``: rows of A against columns of KT."""
    if kernel == GAUSSIAN:
        # Summed as squares of differences: expanding the square would cancel far from the origin.
        factor = scale * S.dtype.type(-0.5)
        for i in range(rows):
            S[i, :keys] = 0
            for d in range(head_dim):
                a = A[i, d]
                for j in range(keys):
                    difference = a - KT[d, j]
                    S[i, j] += difference * difference
            for j in range(keys):
                S[i, j] *= factor
        return
    project(S, 0, A, KT, rows, keys, head_dim)
    for i in range(rows):
        for j in range(keys):
            S[i, j] *= scale


@njit(nogil=True, cache=True, error_model="numpy")
def project(S, first, A, KT, rows, keys, head_dim):
    """S[first:first+rows, :keys] = A[first:first+rows] @ KT[:, :keys]."""
    S[first : first + (rows + MR - 1) // MR * MR, :] = 0
    multiply_add(S, first, A, first, False, KT, rows, keys, head_dim, False)


@njit(nogil=True, cache=True, error_model="numpy")
def within(first, end, key, keys):
    """The keys ``first .. end`` of a row as columns of the tile that starts at ``key``."""
    f = min(max(first - key, 0), keys)
    return f, max(f, min(end - key, keys))


@njit(nogil=True, cache=True, error_model="numpy")
def row_maximum(S, row, first, end, lanes):
    """Largest of S[row, first:end] that is not NaN, -inf if there is none; ``lanes`` is scratch of 16."""
    lanes[:] = -np.inf
    # Sixteen running maxima: a single one cannot be vectorised without assuming NaN away.
    j = first
    while j + 16 <= end:
        for lane in range(16):
            s = S[row, j + lane]
            lanes[lane] = s if s > lanes[lane] else lanes[lane]
        j += 16
    m = lanes[0]
    for lane in range(1, 16):
        m = lanes[lane] if lanes[lane] > m else m
    while j < end:
        s = S[row, j]
        m = s if s > m else m
        j += 1
    return m


@njit(nogil=True, cache=True, error_model="numpy")
def exponentials(S, row, first, end, m):
    """S[row, first:end] becomes exp(S - m)."""
    for j in range(first, end):
        S[row, j] = exp(S[row, j] - m)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def row_sum(S, row, first, end):
    total = S.dtype.type(0)
    for j in range(first, end):
        total += S[row, j]
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def row_dot(A, a_row, B, b_row, first, end):
    total = A.dtype.type(0)
    for j in range(first, end):
        total += A[a_row, j] * B[b_row, j]
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def weigh_row(S, O, i, t_row, first, end, keys, m, d1, d2, t0, shifted, lanes):
    """Scores of row ``i`` become weights, its running sums move on to the new maximum.

    ``t_row`` is the row of the probe scores in S and of O2 in O, or -1; it becomes weights times shifted
    probe scores.
    """
    S[i, :first] = 0
    S[i, end:keys] = 0
    if t_row >= 0:
        S[t_row, :first] = 0
        S[t_row, end:keys] = 0
    if end <= first:
        return
    largest = row_maximum(S, i, first, end, lanes)
    if largest > m[i]:
        correction = exp(m[i] - largest)
        d1[i] *= correction
        d2[i] *= correction
        for d in range(O.shape[1]):
            O[i, d] *= correction
        if t_row >= 0:
            for d in range(O.shape[1]):
                O[t_row, d] *= correction
        m[i] = largest
    # Scores that are all -inf so far weigh nothing; against their own maximum they would be NaN.
    exponentials(S, i, first, end, m[i] if m[i] != -np.inf else m.dtype.type(0))
    total = row_sum(S, i, first, end)
    d1[i] += total
    if t_row < 0:
        return
    # Keys with a large common component make the probe scores large and nearly constant, and the output
    # then a difference of large numbers: they are kept relative to the first tile's weighted mean.
    if not shifted[i] and total != 0:
        t0[i] = row_dot(S, i, S, t_row, first, end) / total
        shifted[i] = True
    shift = t0[i]
    for j in range(first, end):
        S[t_row, j] = S[i, j] * (S[t_row, j] - shift)
    d2[i] += row_sum(S, t_row, first, end)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def accumulate_visible(O, o_row, S, s_row, V, first, end, value_dim):
    """O[o_row] += S[s_row, first:end] @ V[first:end]: a hidden NaN must not be multiplied by a weight of 0."""
    for j in range(first, end):
        weight = S[s_row, j]
        for d in range(value_dim):
            O[o_row, d] += weight * V[j, d]


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
    counter, items, sequences, tensors, page_table, page_size, tile_rows, head_dim, value_dim, group,
    causal, window, kernel, scale, intercept, amplification, out, m_out, d1_out, d2_out, t0_out, O1_out, O2_out,
):  # fmt: skip
    """Take items of work until none is left.

    items: ``(n, 7)`` int64: sequence, key head, first row and the one after the last (the rows of a key head
    are its query heads' interleaved, at most ``tile_rows``), first key and the one after the last, index of
    the split. out: ``(B, Lq, Hq, Dv)``, or of size 0 where only states are wanted; the states:
    ``(splits, B, Lq, Hq[, Dv])``, or of size 0. All are of one dtype, in which everything is accumulated.
    """
    dtype = m_out.dtype
    zero = dtype.type(0)
    probed = tensors[3, 0] != 0
    stacked = tile_rows * 2 if probed else tile_rows
    # A microkernel's last block may overrun the rows in use.
    A = np.zeros((stacked + MR, head_dim), dtype)
    S = np.zeros((stacked + MR, KEY_TILE), dtype)
    O = np.zeros((stacked + MR, (value_dim + NR - 1) // NR * NR), dtype)
    KT = np.zeros((head_dim, KEY_TILE), dtype)
    V = np.zeros((KEY_TILE, O.shape[1]), dtype)
    m, d1, d2 = np.empty(tile_rows, dtype), np.empty(tile_rows, dtype), np.empty(tile_rows, dtype)
    t0, shifted = np.empty(tile_rows, dtype), np.empty(tile_rows, np.bool_)
    firsts, ends = np.empty(tile_rows, np.int64), np.empty(tile_rows, np.int64)
    lanes = np.empty(16, dtype)
    while True:
        taken = fetch_add(counter)
        if taken >= items.shape[0]:
            break
        sequence, head, row = sequences[items[taken, 0]], items[taken, 1], items[taken, 2]
        rows, split = items[taken, 3] - row, items[taken, 6]
        read_query_rows(tensors[0], sequence, head, group, row, rows, head_dim, A, 0)
        if probed:
            read_query_rows(tensors[3], sequence, head, group, row, rows, head_dim, A, rows)
        total = rows * 2 if probed else rows
        begin, end = items[taken, 5], items[taken, 4]
        for i in range(rows):
            f, e = visible(sequence, (row + i) // group, causal, window)
            firsts[i] = max(f, items[taken, 4])
            ends[i] = max(firsts[i], min(e, items[taken, 5]))
            if ends[i] > firsts[i]:
                begin, end = min(begin, firsts[i]), max(end, ends[i])
        m[:], d1[:], d2[:], t0[:] = -np.inf, 0, 0, 0
        shifted[:] = False
        O[:] = 0
        for key in range(begin, end, KEY_TILE):
            keys = min(KEY_TILE, end - key)
            read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, KT, True)
            read_keys(tensors[2], sequence, page_table, page_size, head, key, keys, value_dim, V, False)
            if kernel == DOT and probed:
                project(S, 0, A, KT, total, keys, head_dim)
                for i in range(rows):
                    for j in range(keys):
                        S[i, j] *= scale
            else:
                if probed:
                    project(S, rows, A, KT, rows, keys, head_dim)
                score(S, A, KT, rows, keys, head_dim, kernel, scale)
            partial = False
            for i in range(rows):
                f, e = within(firsts[i], ends[i], key, keys)
                partial = partial or f > 0 or e < keys
                weigh_row(S, O, i, rows + i if probed else -1, f, e, keys, m, d1, d2, t0, shifted, lanes)
            if partial and not all_finite(V, keys, value_dim):
                for i in range(rows):
                    f, e = within(firsts[i], ends[i], key, keys)
                    accumulate_visible(O, i, S, i, V, f, e, value_dim)
                    if probed:
                        accumulate_visible(O, rows + i, S, rows + i, V, f, e, value_dim)
            else:
                multiply_add(O, 0, S, 0, False, V, total, value_dim, keys, False)
        for i in range(rows):
            b, query = sequence[0], sequence[1] + (row + i) // group
            query_head = head * group + (row + i) % group
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
                    rq = row_dot(A, i, A, rows + i, 0, head_dim) if probed else zero
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
