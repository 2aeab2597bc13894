"""Gradients of softmax attention, Parallax and local linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .. import exchange
from ..errors import SolverError
from ..problem import Problem, check_gradient
from ..state import LLAState, ParallaxState, SoftmaxState
from .arguments import attention_arguments, ridge_argument
from .rows import _masks
from .solvers import solve
from .weights import dot_scores, softmax_weights


def softmax_attention_backward(
    do, q, k, v, o, state, *, scale=None, causal=True, window_size=None, cu_seqlens=None
):
    """The gradient of softmax attention in float64.

    do: the gradient of the output, ``(B, Lq, Hq, Dv)``; q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v:
    ``(B, Lk, Hkv, Dv)``; o and state: the output and the SoftmaxState of the forward call, or None for the
    state; do and o of the dtype of q or float64; the options as for
    :func:`parallax_core.reference.softmax_attention`. o and state are checked and not needed: everything is
    computed again in float64.
    Returns ``dq, dk, dv``, float64, of the shapes of q, k and v, with what all query heads of a group give to
    their key head added up. Rows that see no key and keys that no row sees have gradients of 0, whatever they
    hold; a NaN that is seen makes what depends on it NaN.
    Raises ValueError for shapes, ranges and lengths (a state of another problem among them), TypeError for
    dtypes and for a state of another kind.
    Source: docs/math.md, "Gradients".
    """
    options = {"scale": scale, "causal": causal, "window_size": window_size, "cu_seqlens": cu_seqlens}
    problem, q, _, k, v = attention_arguments("softmax_attention_backward", q, k, v, **options)
    g = _checked(problem, do, o, state, SoftmaxState)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _blocks(problem, k, v, q, g):
            rows, seen, keys = block.rows, block.seen, block.keys
            p = _weights(problem, block, q[rows])
            dS = -p * _below_mean(block, p, g[rows])
            dq[rows] = problem.scale * (dS @ keys)
            dk[seen] += problem.scale * (dS.T @ q[rows])
            dv[seen] += p.T @ g[rows]
    return dq, dk, dv


def parallax_attention_backward(
    do, q, r, k, v, o, state, *, scale=None, causal=True, window_size=None, cu_seqlens=None
):
    """The gradient of Parallax attention in float64.

    r: the probe, as for :func:`parallax_core.reference.parallax_attention`; state: the ParallaxState of the
    forward call, or None; the other arguments and what is raised as for :func:`softmax_attention_backward`.
    Returns ``dq, dr, dk, dv``, float64, of the shapes of q, r, k and v.
    Source: docs/math.md, "Gradients".
    """
    options = {"scale": scale, "causal": causal, "window_size": window_size, "cu_seqlens": cu_seqlens}
    problem, q, r, k, v = attention_arguments("parallax_attention_backward", q, k, v, r, **options)
    g = _checked(problem, do, o, state, ParallaxState)
    dq, dr, dk, dv = np.zeros(q.shape), np.zeros(r.shape), np.zeros(k.shape), np.zeros(v.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _blocks(problem, k, v, q, r, g):
            rows, seen, keys, visible = block.rows, block.seen, block.keys, block.visible
            p = _weights(problem, block, q[rows])
            t = np.where(visible, r[rows] @ keys.T, 0.0)
            t = np.where(visible, t - (p * t).sum(axis=1, keepdims=True), 0.0)
            below = _below_mean(block, p, g[rows])
            dT = p * below
            # The document's w G - p tau + p (t - c) b, by the differences b - G alone: tau is b plus the mean
            # of (t - c)(b - G).
            dS = np.where(visible, p * ((t - 1) * below - (dT * t).sum(axis=1, keepdims=True)), 0.0)
            dq[rows] = problem.scale * (dS @ keys)
            dr[rows] = dT @ keys
            dk[seen] += problem.scale * (dS.T @ q[rows]) + dT.T @ r[rows]
            dv[seen] += (p * (1 - t)).T @ g[rows]
    return dq, dr, dk, dv


def lla_attention_backward(
    do,
    q,
    k,
    v,
    o,
    state,
    *,
    ridge,
    solver="cholesky",
    scale=None,
    causal=True,
    window_size=None,
    cu_seqlens=None,
):
    """The gradient of local linear attention in float64, by the implicit function of its ridge system.

    ridge and solver: as for :func:`parallax_core.reference.lla_attention`, the solver being that of the
    adjoint system too; state: the LLAState of the forward call, or None; the other arguments as for
    :func:`softmax_attention_backward`. A ridge of 0 (``lstsq``) is taken where the keys that a row sees span
    the space, so that ``C_kk`` is invertible: the minimum-norm solution of fewer keys is no smooth function
    of them everywhere, and where it is, its derivative has a term that the implicit function lacks.
    Returns ``dq, dk, dv, dridge``, float64; dridge has the shape ``(B, Lq, Hq)`` that ridge broadcasts to.
    Raises what :func:`softmax_attention_backward` does, and SolverError where the system of a row cannot be
    solved, or its ridge is 0 and C_kk is singular (eigenvalues up to ``D * eps`` of the largest).
    Source: LLA, arXiv 2510.01450; docs/math.md, "Gradients".
    """
    options = {"scale": scale, "causal": causal, "window_size": window_size, "cu_seqlens": cu_seqlens}
    problem, q, _, k, v = attention_arguments("lla_attention_backward", q, k, v, **options)
    ridge = ridge_argument(ridge, problem, solver)
    g = _checked(problem, do, o, state, LLAState)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dridge = np.zeros(problem.row_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in _blocks(problem, k, v, q, g):
            batch, rows, head = block.rows
            p = _weights(problem, block, q[block.rows])
            for i, sees in enumerate(block.visible):
                if not sees.any():
                    continue
                row, seen = (batch, rows.start + i, head), (batch, block.positions[sees], block.kv_head)
                dq[row], dk_row, dv_row, dridge[row] = _lla_row(
                    q[row], block.keys[sees], block.values[sees], p[i, sees], g[row], ridge[row],
                    solver, problem.scale,
                )  # fmt: skip
                dk[seen] += dk_row
                dv[seen] += dv_row
    return dq, dk, dv, dridge


def _lla_row(q, keys, values, p, g, ridge, solver, scale):
    """The gradients that one row gives, with the keys it sees: dq ``(D,)``, dk, dv and the ridge's."""
    # About one of the keys first, as in the forward call: rounding of kbar leaves no spread of its own.
    origin = keys[p.argmax()]
    x = keys - origin
    kbar = p @ x
    x, b = x - kbar, (q - origin) - kbar
    A = np.sqrt(p)[:, None] * x
    if ridge == 0:
        _check_rank(A)
    G = values @ g
    G = G - p @ G
    u = solve(A, b, ridge, solver)
    y = solve(A, (p * G) @ x, ridge, solver)
    w, rest = 1 + x @ u, G - x @ y
    # The document's dp_j, up to a constant of the row, which dS does not see.
    dp = rest * w
    dS = p * (dp - p @ dp)
    dq = y + scale * (dS @ x)
    dk = p[:, None] * (np.outer(rest, u) - np.outer(w, y)) + scale * np.outer(dS, q)
    return dq, dk, np.outer(p * w, g), -(y @ u)


def _check_rank(A: np.ndarray) -> None:
    D = A.shape[1]
    if not np.isfinite(A).all():
        return
    singular = np.linalg.svd(A, compute_uv=False)
    rank = int((singular > np.sqrt(D * np.finfo(np.float64).eps) * singular[0]).sum())
    if rank < D:
        raise SolverError(
            f"ridge is 0 in a row whose keys span {rank} of {D} dimensions, where the gradient of the "
            "minimum-norm solution is not supported; use a ridge above 0"
        )


class _Block(NamedTuple):
    """Rows of one query head of one sequence, and the keys that at least one of them sees.

    rows: their index in ``(B, Lq, Hq)``; positions and kv_head: where the keys ``(n, D)`` and values
    ``(n, Dv)`` lie; visible: ``(number of rows, n)``. A block in which any number is not finite is one row
    with the keys it sees, so that 0 * NaN arises neither from a key hidden from a row nor from a row to which
    a key is hidden.
    """

    rows: tuple[int, slice, int]
    positions: np.ndarray
    kv_head: int
    keys: np.ndarray
    values: np.ndarray
    visible: np.ndarray

    @property
    def seen(self) -> tuple[int, np.ndarray, int]:
        """The index of the keys in ``(B, Lk, Hkv)``."""
        return self.rows[0], self.positions, self.kv_head


def _blocks(problem: Problem, k: np.ndarray, v: np.ndarray, *row_arrays: np.ndarray) -> Iterator[_Block]:
    """The blocks of a call, which cover every row once; what no row sees is never read."""
    for batch, rows, positions, visible in _masks(problem):
        seen = visible.any(axis=0)
        positions, visible = positions[seen], visible[:, seen]
        for head in range(problem.q_heads):
            kv_head = head // problem.group_size
            keys, values = (x[batch, positions, kv_head].astype(np.float64) for x in (k, v))
            block = _Block((batch, rows, head), positions, kv_head, keys, values, visible)
            inputs = (keys, values, *(x[block.rows] for x in row_arrays))
            if all(np.isfinite(x).all() for x in inputs):
                yield block
                continue
            for i, sees in enumerate(visible):
                row = slice(rows.start + i, rows.start + i + 1)
                yield _Block(
                    (batch, row, head), positions[sees], kv_head, keys[sees], values[sees], sees[None, sees]
                )


def _weights(problem: Problem, block: _Block, q: np.ndarray) -> np.ndarray:
    """The weights of a block, 0 where the key is hidden even in a row whose normaliser is NaN."""
    p = softmax_weights(dot_scores(problem.scale, q, block.keys), block.visible).p
    return np.where(block.visible, p, 0.0)


def _below_mean(block: _Block, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """``b - G_j``, how far below its mean of the row each ``G_j = g.v_j`` is, 0 where the key is hidden."""
    G = np.where(block.visible, g @ block.values.T, 0.0)
    return np.where(block.visible, (p * G).sum(axis=1, keepdims=True) - G, 0.0)


def _checked(problem: Problem, do, o, state, kind: type) -> np.ndarray:
    """Check what comes from the forward call and from behind it; the output's gradient as float64."""
    do, o = exchange.to_numpy("do", do), exchange.to_numpy("o", o)
    if isinstance(state, kind):
        state = kind(*(exchange.to_numpy(f"state.{field}", x) for field, x in zip(state._fields, state)))
    check_gradient(problem, do, o, state, kind, float64=True)
    return do.astype(np.float64)
