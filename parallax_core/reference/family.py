"""Every estimator of the family by its bandwidth, kernel, probe, affine structure and amplification."""

from __future__ import annotations

import numpy as np

from ..problem import check_family, checked_bandwidth
from .arguments import attention_arguments, ridge_argument
from .lla import solve_slopes
from .rows import blocks
from .weights import dot_scores, gaussian_scores, softmax_weights

_SCORES = {"dot": dot_scores, "gaussian": gaussian_scores}


def local_attention(
    q,
    k,
    v,
    *,
    probe,
    scale=None,
    bandwidth=None,
    kernel="dot",
    intercept=True,
    amplification=False,
    ridge=None,
    solver="cholesky",
    causal=True,
    window_size=None,
    cu_seqlens=None,
):
    """Any point of the family of local estimators in float64, ``o = vbar - C_vk r / (1 - alpha)``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``, of one dtype.
    probe: None (``r = 0``), ``"query"`` (``r = -q``), ``"solve"`` (``r = -(C_kk + ridge I)^-1 (q - kbar)``)
    or an array of the shape of q. scale, or bandwidth with ``scale = 1/bandwidth^2``: by default
    ``1/sqrt(D)``. kernel: ``"dot"``, ``w_j = exp(scale q.k_j)``, or ``"gaussian"``,
    ``w_j = exp(-scale/2 |q - k_j|^2)``, which takes a scale of 0 or more. intercept: without it
    ``o = -M_vk r`` on the raw moments (``"solve"``: ``r = -(M_kk + ridge I)^-1 q``). amplification:
    ``alpha = r.(kbar - q)`` instead of 0. ridge and solver: of ``"solve"``, as for
    :func:`parallax_core.reference.lla_attention`; the masks as for
    :func:`parallax_core.reference.softmax_attention`.
    Returns ``o (B, Lq, Hq, Dv)`` float64, 0 in a row that sees no key.
    Raises ValueError for shapes, ranges, lengths and options that exclude each other, TypeError for dtypes,
    SolverError where a ridge system cannot be solved.
    Source: Parallax, arXiv 2605.29157; LLA, arXiv 2510.01450; docs/math.md, "The family".
    """
    array = None if probe is None or isinstance(probe, str) else probe
    problem, q, r, k, v = attention_arguments(
        "local_attention",
        q,
        k,
        v,
        array,
        scale=scale if bandwidth is None else checked_bandwidth(scale, bandwidth, head_dim=1),
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
    check_family(probe, kernel, intercept, amplification, ridge, problem.scale)
    if isinstance(probe, str) and probe == "solve":
        ridge = ridge_argument(ridge, problem, solver)
    elif isinstance(probe, str):
        r = -q
    out = np.zeros(problem.output_shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for block in blocks(problem, k, v):
            rows = block.rows
            p = softmax_weights(_SCORES[kernel](problem.scale, q[rows], block.keys), block.visible).p
            if probe is None:
                out[rows] = p @ block.values
                continue
            if r is None:
                u, along = solve_slopes(block, p, q[rows], ridge[rows], solver, intercept=intercept)
                row_r, t = -u, -along
            else:
                row_r, t = r[rows], np.where(block.visible, r[rows] @ block.keys.T, 0.0)
            if not intercept:
                out[rows] = -(p * t) @ block.values
                continue
            deviation = np.where(block.visible, t - (p * t).sum(axis=1, keepdims=True), 0.0)
            if amplification:
                alpha = (row_r * (p @ block.keys - q[rows])).sum(axis=1)
                deviation = np.where(block.visible, deviation / (1 - alpha[:, None]), 0.0)
            out[rows] = (p * (1 - deviation)) @ block.values
    return out
