"""The loop over tiles that gradients share: softmax, Parallax and local linear attention.

Source: docs/math.md, "Gradients".
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .intrinsics import exp, fetch_add
from .microkernel import MR, multiply_add
from .tile_loop import accumulate_visible, every_column, hide, project, row_dot, scale_row, within
from .tiles import (
    KEY_STRIDE,
    KEY_TILE,
    all_finite,
    read_keys,
    read_query_rows,
    read_row,
    stride,
    transpose,
    visible,
)

SOFTMAX, PARALLAX, LLA = 0, 1, 2
PROBE, SLOPE, ADJOINT = 3, 3, 4
"""Places of the row arrays beside q in the table of tensors: r, or u and y."""
MAXIMUM, NORMALISER, OUTPUT, MEAN, SHIFT, CENTRE, ADJOINT_CENTRE = range(7)
"""Columns of the numbers kept for a row: m, d1, g.o, g.vbar, t0, c - t0 (or u.kbar), y.kbar."""


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def weight_row(S, i, m, d1):
    """Scores of a row become normalised weights."""
    normaliser = S.dtype.type(1) / d1
    for j in range(KEY_TILE):
        S[i, j] = exp(S[i, j] - m) * normaliser


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def softmax_row(S, G, W, i, tau, scale):
    """S: weights p, becomes scale * dS; W: becomes the weights of dv."""
    for j in range(KEY_TILE):
        p = S[i, j]
        W[i, j] = p
        S[i, j] = p * (G[i, j] - tau) * scale


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def parallax_row(S, G, W, i, t_row, tau, b, shift, c, scale):
    """S: p and t, become scale * dS and dT; W: becomes the weights of dv."""
    one = S.dtype.type(1)
    for j in range(KEY_TILE):
        p, g = S[i, j], G[i, j]
        t = (S[t_row, j] - shift) - c
        rest = b - g
        W[i, j] = p * (one - t)
        S[t_row, j] = p * rest
        S[i, j] = p * ((g - tau) + t * rest) * scale


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def lla_row(S, G, W, i, u_row, y_row, mean, b, u_centre, y_centre, scale):
    """S: p, u.k and y.k, become the coefficients of q, u and y in dk; W: becomes the weights of dv.

    ``mean``: the weighted mean of the derivatives by the weights.
    """
    one = S.dtype.type(1)
    for j in range(KEY_TILE):
        p, g = S[i, j], G[i, j]
        a = S[u_row, j] - u_centre
        along = S[y_row, j]
        e = along - y_centre
        rest = (g - b) - e
        S[i, j] = p * ((g - along) + a * rest - mean) * scale
        S[u_row, j] = p * rest
        W[i, j] = p * (one + a)
        S[y_row, j] = -W[i, j]


@njit(nogil=True, cache=True, error_model="numpy")
def seeing_queries(sequence, first, end, causal, window):
    """First query that sees a key of ``first .. end``, and the one after the last."""
    queries = sequence[2] - sequence[1]
    if not causal:
        return 0, queries
    hidden = sequence[4] - queries
    low = max(0, first - hidden)
    high = queries
    if window > 0:
        high = min(high, end - 1 - hidden + window)
    return low, max(low, high)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def differentiate(
    counter, items, sequences, tensors, page_table, page_size, tile_rows, longest, head_dim, value_dim, group,
    causal, window, scale, kind, numbers, gradient, with_keys, dq, dr, dk, dv,
):  # fmt: skip
    """Take items of work until none is left.

    items: ``(n, 5)`` int64: sequence, key head, first key and the one after the last, index of the chunk.
    tensors: rows q, k, v and r (Parallax) or u and y (LLA). numbers: ``(B, Lq, Hq, 7)``, the columns above.
    gradient: the row of ``tensors`` that describes do. longest: the most query rows of a key head. dq, dr:
    ``(chunks, B, Lq, Hq, D)``, dr of size 0 where no probe is differentiated; dk, dv:
    ``(B, Lk, Hkv, D or Dv)``, left alone unless ``with_keys``.
    """
    dtype = dq.dtype
    stack = 1 + kind
    # The rows whose product with the keys is wanted: q's, and r's.
    outward = stack if kind == PARALLAX else 1
    width, value_width = stride(head_dim), stride(value_dim)
    tiles = (longest + tile_rows - 1) // tile_rows
    A = np.zeros((stack * tile_rows + MR, width), dtype)
    S = np.zeros((stack * tile_rows + MR, KEY_STRIDE), dtype)
    g = np.zeros((tile_rows + MR, value_width), dtype)
    G = np.zeros((tile_rows + MR, KEY_STRIDE), dtype)
    W = np.zeros((tile_rows + MR, KEY_STRIDE), dtype)
    K, KT = np.zeros((KEY_TILE, width), dtype), np.zeros((width, KEY_STRIDE), dtype)
    V, VT = np.zeros((KEY_TILE, value_width), dtype), np.zeros((value_width, KEY_STRIDE), dtype)
    # Blocks of the transposed products may overrun the tile's keys by less than a block.
    DK = np.zeros((KEY_TILE + MR, width), dtype)
    DV = np.zeros((KEY_TILE + MR, value_width), dtype)
    DQ = np.zeros((tiles * outward * tile_rows + MR, width), dtype)
    firsts, ends = np.empty(tile_rows, np.int64), np.empty(tile_rows, np.int64)
    first_columns, end_columns = every_column(S)
    while True:
        taken = fetch_add(counter)
        if taken >= items.shape[0]:
            break
        sequence, head, chunk = sequences[items[taken, 0]], items[taken, 1], items[taken, 4]
        batch = sequence[0]
        total = (sequence[2] - sequence[1]) * group
        DQ[:] = 0
        for key in range(items[taken, 2], items[taken, 3], KEY_TILE):
            keys = min(KEY_TILE, items[taken, 3] - key)
            read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, K, 0)
            read_keys(tensors[2], sequence, page_table, page_size, head, key, keys, value_dim, V, 0)
            transpose(K, head_dim, KT, 0)
            transpose(V, value_dim, VT, 0)
            tile_finite = all_finite(K, 0, keys, head_dim)
            DK[:] = 0
            DV[:] = 0
            low, high = seeing_queries(sequence, key, key + keys, causal, window)
            for tile in range(low * group // tile_rows, (high * group + tile_rows - 1) // tile_rows):
                row = tile * tile_rows
                rows = min(tile_rows, total - row)
                read_query_rows(tensors[0], sequence, head, group, row, rows, head_dim, A, 0)
                for s in range(1, stack):
                    read_query_rows(tensors[2 + s], sequence, head, group, row, rows, head_dim, A, s * rows)
                read_query_rows(tensors[gradient], sequence, head, group, row, rows, value_dim, g, 0)
                project(S, 0, A, KT, 0, stack * rows, head_dim, first_columns, end_columns)
                project(G, 0, g, VT, 0, rows, value_dim, first_columns, end_columns)
                partial = False
                for i in range(rows):
                    f, e = visible(sequence, (row + i) // group, causal, window)
                    f, e = within(f, e, key, keys)
                    firsts[i], ends[i] = f, e
                    scale_row(S, i, scale)
                    if e - f < KEY_TILE:
                        partial = partial or f > 0 or e < keys
                        hide(S, i, 0, f, e, KEY_TILE, -np.inf)
                        hide(G, i, 0, f, e, KEY_TILE, 0.0)
                        for s in range(1, stack):
                            hide(S, s * rows + i, 0, f, e, KEY_TILE, 0.0)
                    n = numbers[batch, sequence[1] + (row + i) // group, head * group + (row + i) % group]
                    if e <= f:
                        # What is kept for a row that sees no key at all is 0 / 0.
                        hide(S, i, 0, 0, 0, KEY_TILE, 0.0)
                        hide(W, i, 0, 0, 0, KEY_TILE, 0.0)
                        continue
                    weight_row(S, i, n[MAXIMUM], n[NORMALISER])
                    if kind == SOFTMAX:
                        softmax_row(S, G, W, i, n[OUTPUT], scale)
                    elif kind == PARALLAX:
                        parallax_row(S, G, W, i, rows + i, n[OUTPUT], n[MEAN], n[SHIFT], n[CENTRE], scale)
                    else:
                        lla_row(
                            S, G, W, i, rows + i, 2 * rows + i, n[OUTPUT], n[MEAN], n[CENTRE],
                            n[ADJOINT_CENTRE], scale,
                        )  # fmt: skip
                    if e - f < KEY_TILE:
                        # A row whose own numbers overflowed is NaN where it sees a key, and there alone.
                        hide(W, i, 0, f, e, KEY_TILE, 0.0)
                        for s in range(stack):
                            hide(S, s * rows + i, 0, f, e, KEY_TILE, 0.0)
                at = tile * outward * tile_rows
                if partial and not (
                    tile_finite
                    and all_finite(A, 0, stack * rows, head_dim)
                    and all_finite(g, 0, rows, value_dim)
                ):
                    for i in range(rows):
                        f, e = firsts[i], ends[i]
                        for s in range(outward):
                            accumulate_visible(DQ, at + s * rows + i, S, s * rows + i, K, 0, f, e, head_dim)
                        for j in range(f, e):
                            for s in range(stack):
                                for d in range(head_dim):
                                    DK[j, d] += S[s * rows + i, j] * A[s * rows + i, d]
                            for d in range(value_dim):
                                DV[j, d] += W[i, j] * g[i, d]
                    continue
                multiply_add(DQ, at, S, 0, False, K, outward * rows, head_dim, keys, False)
                if with_keys:
                    multiply_add(DK, 0, S, 0, True, A, keys, head_dim, stack * rows, False)
                    multiply_add(DV, 0, W, 0, True, g, keys, value_dim, rows, False)
            if with_keys:
                for j in range(keys):
                    for d in range(head_dim):
                        dk[batch, key + j, head, d] = DK[j, d]
                    for d in range(value_dim):
                        dv[batch, key + j, head, d] = DV[j, d]
        for row in range(total):
            tile = row // tile_rows
            rows = min(tile_rows, total - tile * tile_rows)
            at = tile * outward * tile_rows + row % tile_rows
            query, h = sequence[1] + row // group, head * group + row % group
            for d in range(head_dim):
                dq[chunk, batch, query, h, d] = DQ[at, d]
            if outward == 2:
                for d in range(head_dim):
                    dr[chunk, batch, query, h, d] = DQ[at + rows, d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def row_numbers(tensors, gradient, sequences, group, kind, m, d1, d2, t0, O1, O2, numbers):
    """Fill the numbers of every row of softmax and Parallax from the forward's state."""
    heads, value_dim = m.shape[2], O1.shape[3]
    g, vbar = np.empty((1, value_dim), m.dtype), np.empty((1, value_dim), m.dtype)
    one = m.dtype.type(1)
    for b in range(m.shape[0]):
        for i in range(m.shape[1]):
            for h in range(heads):
                read_row(tensors[gradient], b, i, h, g, 0, value_dim)
                for d in range(value_dim):
                    vbar[0, d] = O1[b, i, h, d] / d1[b, i, h]
                mean = row_dot(g, 0, vbar, 0, 0, value_dim)
                n = numbers[b, i, h]
                n[MAXIMUM], n[NORMALISER], n[OUTPUT], n[MEAN] = m[b, i, h], d1[b, i, h], mean, mean
                if kind == PARALLAX:
                    c = d2[b, i, h] / d1[b, i, h]
                    for d in range(value_dim):
                        vbar[0, d] = (one + c) * vbar[0, d] - O2[b, i, h, d] / d1[b, i, h]
                    n[OUTPUT] = row_dot(g, 0, vbar, 0, 0, value_dim)
                    n[SHIFT], n[CENTRE] = t0[b, i, h], c
