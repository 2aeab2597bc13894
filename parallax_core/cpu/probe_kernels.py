"""The probes of local linear attention: a weighted second moment and a ridge solve for every query row.

Source: docs/math.md, "Attention as regression at test time".
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .intrinsics import exp, fetch_add
from .microkernel import MR, multiply_add
from .tile_loop import every_column, score, within
from .tiles import KEY_STRIDE, KEY_TILE, read_keys, read_query_rows, stride, transpose, visible

CHOLESKY, CG, LSTSQ = 0, 1, 2
FAILED, WORST = 0, 1
"""Places in the status: rows that could not be solved, and the worst relative residual in units of 1e-18."""


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def dot(a, b, size):
    total = a.dtype.type(0)
    for j in range(size):
        total += a[j] * b[j]
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _finite(a, n):
    finite = True
    for i in range(n):
        finite = finite and np.isfinite(a[i])
    return finite


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def centre_rows(X, keys, head_dim, base, origin, weights, first, root):
    """X[j] = (X[j] - base) - origin, times the root of its weight if wanted."""
    for j in range(keys):
        factor = np.sqrt(weights[first + j]) if root else X.dtype.type(1)
        for d in range(head_dim):
            X[j, d] = factor * ((X[j, d] - base[d]) - origin[d])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def mean_about_heaviest(
    tensor, sequence, page_table, page_size, head, first, weights, begin, end, n, X, base, mean
):  # fmt: skip
    """base = the key of largest weight of ``begin .. end``, mean = the weighted mean of the keys less base.

    ``weights`` starts at ``first``. A direction in which all keys agree comes out as exactly 0, where the
    rounding of their mean would leave a spread that nothing but rounding bounds from below.
    """
    heaviest = begin
    for key in range(begin, end):
        if weights[key - first] > weights[heaviest - first]:
            heaviest = key
    read_keys(tensor, sequence, page_table, page_size, head, heaviest, 1, n, X, 0)
    for d in range(n):
        base[d] = X[0, d]
        mean[d] = 0
    for key in range(begin, end, KEY_TILE):
        keys = min(KEY_TILE, end - key)
        read_keys(tensor, sequence, page_table, page_size, head, key, keys, n, X, 0)
        for j in range(keys):
            for d in range(n):
                mean[d] += weights[key - first + j] * (X[j, d] - base[d])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def factor_cholesky(C, ridge, n, eps, L):
    """L L^T = C + ridge I from the upper triangle of C.

    False where a pivot is negative, or rounding of C (by ``eps``) has left nothing of it.
    """
    for i in range(n):
        for j in range(i):
            L[i, j] = (C[j, i] - dot(L[i], L[j], j)) / L[j, j]
        pivot = C[i, i] + ridge - dot(L[i], L[i], i)
        if not pivot > n * eps * (C[i, i] + ridge):
            return False
        L[i, i] = np.sqrt(pivot)
    return True


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def solve_factored(L, b, n, u):
    """u = (L L^T)^-1 b."""
    for i in range(n):
        u[i] = (b[i] - dot(L[i], u, i)) / L[i, i]
    for i in range(n - 1, -1, -1):
        u[i] /= L[i, i]
        for j in range(i):
            u[j] -= u[i] * L[i, j]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def factor_eigen(C, n, L):
    """Eigenvalues, those that count as zero exactly so, and eigenvectors of C from its upper triangle.

    Zero is what lies below ``n * eps`` of the largest.
    """
    for i in range(n):
        for j in range(i + 1):
            L[i, j] = C[j, i]
            L[j, i] = C[j, i]
    values, vectors = np.linalg.eigh(L[:n, :n])
    cut = n * np.finfo(np.float64).eps * max(values[n - 1], 0.0)
    for e in range(n):
        if not values[e] > cut:
            values[e] = 0
    return values, vectors


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def solve_minimum_norm(values, vectors, b, ridge, n, u):
    """u = (C + ridge I)^+ b."""
    u[:n] = 0
    for e in range(n):
        value = values[e] + ridge
        if value > 0:
            coefficient = 0.0
            for i in range(n):
                coefficient += vectors[i, e] * b[i]
            coefficient /= value
            for i in range(n):
                u[i] += coefficient * vectors[i, e]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def solve_conjugate_gradients(
    tensor, sequence, page_table, page_size, head, first, weights, begin, end, base, origin, ridge, b, n, X,
    u, x, p, s, y, tolerance,
):  # fmt: skip
    """u = (C + ridge I)^-1 b without the matrix; returns the relative residual reached.

    C p is summed over the keys ``begin .. end`` of the row (``weights`` starts at ``first``). x, p, s, y are
    scratch of ``n``.
    """
    bb = 0.0
    for i in range(n):
        x[i] = 0
        s[i] = b[i]
        p[i] = b[i]
        bb += np.float64(b[i]) * np.float64(b[i])
    if bb == 0:
        u[:n] = 0
        return 0.0
    ss = bb
    for _ in range(10 * n + 50):
        if ss <= tolerance * tolerance * bb:
            break
        y[:n] = 0
        for key in range(begin, end, KEY_TILE):
            keys = min(KEY_TILE, end - key)
            read_keys(tensor, sequence, page_table, page_size, head, key, keys, n, X, 0)
            centre_rows(X, keys, n, base, origin, weights, 0, False)
            for j in range(keys):
                factor = weights[key - first + j] * dot(X[j], p, n)
                for i in range(n):
                    y[i] += factor * X[j, i]
        py = 0.0
        for i in range(n):
            y[i] += p.dtype.type(ridge) * p[i]
            py += np.float64(p[i]) * np.float64(y[i])
        step = ss / py
        following = 0.0
        for i in range(n):
            x[i] += p.dtype.type(step) * p[i]
            s[i] -= p.dtype.type(step) * y[i]
            following += np.float64(s[i]) * np.float64(s[i])
        turn = p.dtype.type(following / ss)
        for i in range(n):
            p[i] = s[i] + turn * p[i]
        ss = following
    for i in range(n):
        u[i] = x[i]
    return np.sqrt(ss / bb)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def solve_probes(
    counter, items, sequences, tensors, page_table, page_size, tile_rows, longest, head_dim, value_dim, group,
    causal, window, kernel, scale, centred, solver, tolerance, ridge, m, d1, kbar, r, adjoint, status,
    wk_out, wv_out, wkk_out, wvk_out,
):  # fmt: skip
    """Take items of work until none is left, and write the probe ``r = -u`` of every row.

    items: as for the tiled loop; ``longest``: the most keys of an item. m, d1, ridge: ``(B, Lq, Hq)``; kbar
    and r: ``(B, Lq, Hq, D)``, the weighted mean key, about which moments are taken (``centred``; the
    minimum-norm solver finds and writes its own), and the result. Weights are computed in the dtype of kbar,
    moments and systems in that of r. adjoint: of size 0, or ``(B, Lq, Hq, D)``, right-hand sides that the
    same systems are solved for in place; a system without full rank then counts as failed. The moments of the
    LLA state go to ``w*_out`` unless these are of size 0.
    """
    wide, dtype = kbar.dtype, r.dtype
    eps = np.finfo(dtype).eps
    stated = wkk_out.size > 0
    adjoined = adjoint.size > 0
    width, value_width = stride(head_dim), stride(value_dim)
    A = np.zeros((tile_rows + MR, width), wide)
    K = np.zeros((KEY_TILE, width), wide)
    KT = np.zeros((width, KEY_STRIDE), wide)
    S = np.zeros((tile_rows + MR, KEY_STRIDE), wide)
    first_columns, end_columns = every_column(S)
    weights = np.zeros((tile_rows, longest), dtype)
    # The microkernel reads A^T in blocks of MR columns, which may pass the last one.
    X = np.zeros((KEY_TILE + 1, width), dtype)
    V = np.zeros((KEY_TILE + 1, value_width), dtype)
    C = np.zeros((width + MR, width), dtype)
    C_vk = np.zeros((value_width + MR, width), dtype)
    L = np.zeros((head_dim, head_dim), np.float64)
    wk, b = np.zeros(head_dim, dtype), np.zeros(head_dim, dtype)
    base, origin = np.zeros(head_dim, dtype), np.zeros(head_dim, dtype)
    u, b64 = np.zeros(head_dim, np.float64), np.zeros(head_dim, np.float64)
    x, p, s, y = (
        np.zeros(head_dim, dtype),
        np.zeros(head_dim, dtype),
        np.zeros(head_dim, dtype),
        np.zeros(head_dim, dtype),
    )
    wv = np.zeros(value_dim, dtype)
    while True:
        taken = fetch_add(counter)
        if taken >= items.shape[0]:
            break
        sequence, head, row = sequences[items[taken, 0]], items[taken, 1], items[taken, 2]
        rows = items[taken, 3] - row
        read_query_rows(tensors[0], sequence, head, group, row, rows, head_dim, A, 0)
        begin, end = sequence[4], sequence[3]
        for i in range(rows):
            f, e = visible(sequence, (row + i) // group, causal, window)
            if e > f:
                begin, end = min(begin, f), max(end, e)
        for key in range(begin, end, KEY_TILE):
            keys = min(KEY_TILE, end - key)
            read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, K, 0)
            transpose(K, head_dim, KT, 0)
            score(S, A, KT, 0, rows, head_dim, kernel, scale, first_columns, end_columns)
            for i in range(rows):
                query, h = (row + i) // group, head * group + (row + i) % group
                largest = m[sequence[0], sequence[1] + query, h]
                normaliser = d1[sequence[0], sequence[1] + query, h]
                f, e = visible(sequence, query, causal, window)
                f, e = within(f, e, key, keys)
                for j in range(f, e):
                    weights[i, key - begin + j] = exp(S[i, j] - largest) / normaliser
        for i in range(rows):
            batch, query = sequence[0], sequence[1] + (row + i) // group
            h = head * group + (row + i) % group
            f, e = visible(sequence, (row + i) // group, causal, window)
            if e <= f:
                r[batch, query, h, :] = 0
                if adjoined:
                    adjoint[batch, query, h, :] = 0
                if stated:
                    wk_out[batch, query, h, :], wv_out[batch, query, h, :] = 0, 0
                    wkk_out[batch, query, h, :, :], wvk_out[batch, query, h, :, :] = 0, 0
                continue
            w = weights[i]
            normaliser = d1[batch, query, h]
            if centred and solver == LSTSQ:
                mean_about_heaviest(
                    tensors[1], sequence, page_table, page_size, head, begin, w, f, e, head_dim, X, base,
                    origin,
                )  # fmt: skip
                for d in range(head_dim):
                    kbar[batch, query, h, d] = base[d] + origin[d]
            elif centred:
                for d in range(head_dim):
                    origin[d] = kbar[batch, query, h, d]
            for d in range(head_dim):
                b[d] = (A[i, d] - base[d]) - origin[d]
            if solver == CG:
                for side in range(2 if adjoined else 1):
                    if side == 1:
                        b[:] = adjoint[batch, query, h]
                    residual = solve_conjugate_gradients(
                        tensors[1], sequence, page_table, page_size, head, begin, w, f, e, base, origin,
                        ridge[batch, query, h], b, head_dim, X, u, x, p, s, y, tolerance,
                    )  # fmt: skip
                    if residual > tolerance:
                        status[FAILED] += 1
                        status[WORST] = max(status[WORST], np.int64(min(residual, 1.0) * 1e18))
                    # A row that is not finite ends at once, with no residual to judge by.
                    for d in range(head_dim):
                        value = u[d] if np.isfinite(residual) else np.nan
                        if side == 0:
                            r[batch, query, h, d] = -value
                        else:
                            adjoint[batch, query, h, d] = value
                if not stated:
                    continue
            C[:] = 0
            C_vk[:] = 0
            wk[:] = 0
            wv[:] = 0
            for key in range(f, e, KEY_TILE):
                keys = min(KEY_TILE, e - key)
                read_keys(tensors[1], sequence, page_table, page_size, head, key, keys, head_dim, X, 0)
                centre_rows(X, keys, head_dim, base, origin, w, key - begin, True)
                for j in range(keys):
                    root = np.sqrt(w[key - begin + j])
                    for d in range(head_dim):
                        wk[d] += root * X[j, d]
                multiply_add(C, 0, X, 0, True, X, head_dim, head_dim, keys, True)
                if stated:
                    read_keys(tensors[2], sequence, page_table, page_size, head, key, keys, value_dim, V, 0)
                    for j in range(keys):
                        root = np.sqrt(w[key - begin + j])
                        for d in range(value_dim):
                            V[j, d] *= root
                            wv[d] += root * V[j, d]
                    multiply_add(C_vk, 0, V, 0, True, X, value_dim, head_dim, keys, False)
            if stated:
                for a in range(head_dim):
                    wk_out[batch, query, h, a] = wk[a] * normaliser
                    for d in range(head_dim):
                        wkk_out[batch, query, h, a, d] = C[min(a, d), max(a, d)] * normaliser
                for a in range(value_dim):
                    wv_out[batch, query, h, a] = wv[a] * normaliser
                    for d in range(head_dim):
                        wvk_out[batch, query, h, a, d] = C_vk[a, d] * normaliser
            if solver == CG:
                continue
            # The mean was rounded: what is left of it about the origin is moved off.
            finite = True
            for a in range(head_dim):
                b64[a] = np.float64(b[a]) - (np.float64(wk[a]) if centred else 0.0)
                finite = finite and np.isfinite(b64[a])
                if centred:
                    for d in range(a, head_dim):
                        C[a, d] -= wk[a] * wk[d]
                finite = finite and _finite(C[a, a:], head_dim - a)
            if not finite:
                r[batch, query, h, :] = np.nan
                if adjoined:
                    adjoint[batch, query, h, :] = np.nan
                continue
            lam = ridge[batch, query, h]
            solved = True
            if solver == LSTSQ:
                values, vectors = factor_eigen(C, head_dim, L)
                solve_minimum_norm(values, vectors, b64, lam, head_dim, u)
                # Where the rank can change, the solution of least norm has no derivative.
                solved = not adjoined or values.min() + lam > 0
            else:
                solved = factor_cholesky(C, lam, head_dim, eps, L)
                if solved:
                    solve_factored(L, b64, head_dim, u)
            if not solved:
                status[FAILED] += 1
                continue
            for d in range(head_dim):
                r[batch, query, h, d] = -u[d]
            if adjoined:
                for d in range(head_dim):
                    b64[d] = adjoint[batch, query, h, d]
                if solver == LSTSQ:
                    solve_minimum_norm(values, vectors, b64, lam, head_dim, u)
                else:
                    solve_factored(L, b64, head_dim, u)
                for d in range(head_dim):
                    adjoint[batch, query, h, d] = u[d]
