"""Estimators that weigh all keys alike: MesaNet's global ridge regression and linear attention."""

from __future__ import annotations

import numpy as np

from .arguments import attention_arguments, ridge_argument
from .rows import blocks
from .solvers import solve


def global_ridge_attention(
    q, k, v, *, ridge, solver="cholesky", causal=True, window_size=None, cu_seqlens=None
):
    """Ridge regression of the values on all visible keys, in float64, ``o = G (H + n ridge I)^-1 q``.

    ``G = sum_j v_j k_j^T`` and ``H = sum_j k_j k_j^T`` over the ``n`` keys that a row sees; no intercept.
    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``; ridge: a number or an array that
    broadcasts to ``(B, Lq, Hq)``, per key; the options, what is returned and what is raised as for
    :func:`parallax_core.reference.lla_attention`.
    Source: MesaNet, arXiv 2506.05233; docs/math.md, "The family".
    """
    problem, q, _, k, v = attention_arguments(
        "global_ridge_attention", q, k, v, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens
    )
    ridge = ridge_argument(ridge, problem, solver)
    out = np.zeros(problem.output_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks(problem, k, v):
            rows = block.rows
            for i, sees in enumerate(block.visible):
                keys = block.keys[sees]
                if len(keys):
                    u = solve(keys, q[rows][i], len(keys) * ridge[rows][i], solver)
                    out[rows][i] = (keys @ u) @ block.values[sees]
    return out


def linear_attention(q, k, v, *, causal=True, window_size=None, cu_seqlens=None):
    """Linear attention in float64, divided by the number of keys, ``o = sum_j (q.k_j) v_j / n``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``; ``n`` is the number of keys that a
    row sees; the options, what is returned and what is raised as for
    :func:`parallax_core.reference.softmax_attention`.
    Source: docs/math.md, "The family".
    """
    problem, q, _, k, v = attention_arguments(
        "linear_attention", q, k, v, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens
    )
    out = np.zeros(problem.output_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks(problem, k, v):
            products = np.where(block.visible, q[block.rows] @ block.keys.T, 0.0)
            count = block.visible.sum(axis=1, keepdims=True)
            out[block.rows] = (products @ block.values) / np.maximum(count, 1)
    return out
