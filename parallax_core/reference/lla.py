"""Local linear attention (LLA): ridge regression of the values on the keys around each query."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from ..state import LLAState
from .arguments import attention_arguments, decode_arguments, ridge_argument
from .rows import Block, blocks
from .solvers import solve
from .weights import Weights, dot_scores, softmax_weights


def lla_attention(
    q,
    k,
    v,
    *,
    ridge,
    solver="cholesky",
    scale=None,
    causal=True,
    window_size=None,
    cu_seqlens=None,
    return_state=False,
):
    """Local linear attention in float64, ``o = vbar + C_vk u`` with ``(C_kk + ridge I) u = q - kbar``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``; ridge: a number or an array that
    broadcasts to ``(B, Lq, Hq)``, in squared key units, 0 only with ``lstsq``; solver: ``cholesky``, ``cg``
    (conjugate gradients, C_kk never formed) or ``lstsq`` (minimum norm, with eigenvalues of C_kk up to
    ``D * eps`` of the largest counted as 0 where ridge is 0); the other options and the returned values as
    for :func:`parallax_core.reference.softmax_attention`; the state is an LLAState.
    Raises ValueError for shapes, ranges and lengths, TypeError for dtypes, SolverError where a row's system
    is not numerically positive definite or conjugate gradients do not converge. A row that sees a number
    that is not finite is NaN.
    Source: LLA, arXiv 2510.01450; docs/math.md, "Attention as regression at test time".
    """
    problem, q, _, k, v = attention_arguments(
        "lla_attention",
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
    ridge = ridge_argument(ridge, problem, solver)
    return _lla(problem, q, k, v, ridge, solver, np.empty(problem.output_shape), return_state)


def lla_decode(
    q,
    k_cache,
    v_cache,
    *,
    ridge,
    solver="cholesky",
    cache_seqlens=None,
    cache_leftpad=None,
    page_table=None,
    window_size=None,
    scale=None,
    out=None,
    return_state=False,
):
    """Local linear attention of the newest tokens over a cache, in float64.

    The caches and their options as for :func:`parallax_core.reference.softmax_decode`, ridge and solver as
    for :func:`lla_attention`, which also says what is returned and raised.
    """
    problem, q, _, k_cache, v_cache, out = decode_arguments(
        "lla_decode",
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        window_size=window_size,
        scale=scale,
        out=out,
    )
    ridge = ridge_argument(ridge, problem, solver)
    return _lla(problem, q, k_cache, v_cache, ridge, solver, out, return_state)


def lla_probe(q, k, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None):
    """The probe with which Parallax is local linear attention, ``r = -(C_kk + ridge I)^-1 (q - kbar)``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; the options and what is raised as for
    :func:`lla_attention`.
    Returns ``r (B, Lq, Hq, D)`` float64, 0 in a row that sees no key.
    Source: docs/math.md, "Attention as regression at test time".
    """
    problem, q, _, k, _ = attention_arguments(
        "lla_probe", q, k, None, scale=scale, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens
    )
    ridge = ridge_argument(ridge, problem, solver)
    r = np.zeros(q.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks(problem, k, None):
            rows = block.rows
            weights = softmax_weights(dot_scores(problem.scale, q[rows], block.keys), block.visible)
            u, _ = solve_slopes(block, weights.p, q[rows], ridge[rows], solver)
            r[rows] = -u
    return r


def solve_slopes(
    block: Block, p: np.ndarray, points: np.ndarray, ridge: np.ndarray, solver: str, *, intercept=True
):
    """Solve the ridge system of every row of a block.

    p: the weights, ``(rows, n)``; points: the queries, ``(rows, D)``; ridge: ``(rows,)``. Returns the slopes
    ``u (rows, D)`` of ``(C_kk + ridge I) u = q - kbar`` and ``u.(k_j - kbar)``, ``(rows, n)``; without an
    intercept ``u`` of ``(M_kk + ridge I) u = q`` and ``u.k_j``. Both are 0 where a row sees no key or not
    that key.
    """
    u, along = np.zeros(points.shape), np.zeros(p.shape)
    for i, sees in enumerate(block.visible):
        if not sees.any():
            continue
        keys, weights, b = block.keys[sees], p[i, sees], points[i]
        if intercept:
            # About one of the keys first: a direction in which all keys agree comes out as exactly 0, where
            # the rounding of kbar would leave a spread that a small ridge divides by.
            origin = keys[weights.argmax()]
            keys = keys - origin
            kbar = weights @ keys
            keys, b = keys - kbar, (b - origin) - kbar
        u[i] = solve(np.sqrt(weights)[:, None] * keys, b, ridge[i], solver)
        along[i, sees] = keys @ u[i]
    return u, along


@np.errstate(invalid="ignore", over="ignore")
def _lla(problem: Problem, q, k, v, ridge, solver, out, return_state):
    state = _empty_state(problem, q, ridge) if return_state else None
    for block in blocks(problem, k, v):
        rows = block.rows
        weights = softmax_weights(dot_scores(problem.scale, q[rows], block.keys), block.visible)
        _, along = solve_slopes(block, weights.p, q[rows], ridge[rows], solver)
        mean = (weights.p * along).sum(axis=1, keepdims=True)
        out[rows] = (weights.p * (1 + along - mean)) @ block.values
        if state is not None:
            _accumulate(state, block, weights)
    return (out, state) if return_state else out


def _empty_state(problem: Problem, q, ridge) -> LLAState:
    rows, D, Dv = problem.row_shape, problem.head_dim, problem.value_dim
    return LLAState(
        m=np.full(rows, -np.inf),
        d1=np.zeros(rows),
        k0=np.zeros((*rows, D)),
        wk=np.zeros((*rows, D)),
        wv=np.zeros((*rows, Dv)),
        wkk=np.zeros((*rows, D, D)),
        wvk=np.zeros((*rows, Dv, D)),
        q=q,
        ridge=ridge.copy(),
    )


def _accumulate(state: LLAState, block: Block, weights: Weights) -> None:
    """Fill in the moments of a block's rows, each about its key of largest weight."""
    batch, rows, head = block.rows
    state.m[block.rows], state.d1[block.rows] = weights.m, weights.d1
    state.wv[block.rows] = weights.e @ block.values
    for i, sees in enumerate(block.visible):
        if not sees.any():
            continue
        at = batch, rows.start + i, head
        e = weights.e[i, sees]
        keys, values = block.keys[sees], block.values[sees]
        origin = keys[e.argmax()]
        keys = keys - origin
        state.k0[at], state.wk[at] = origin, e @ keys
        state.wkk[at] = keys.T @ (e[:, None] * keys)
        state.wvk[at] = values.T @ (e[:, None] * keys)
