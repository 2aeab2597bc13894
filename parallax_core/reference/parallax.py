"""Parallax attention: the local linear correction along a given probe."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from ..state import ParallaxState
from .arguments import attention_arguments, decode_arguments
from .rows import blocks
from .weights import dot_scores, softmax_weights


def parallax_attention(
    q, r, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Parallax attention in float64, ``o = vbar - C_vk r``.

    q: ``(B, Lq, Hq, D)``; r: the probe, of the shape of q and its dtype, or float32 beside half precisions,
    or float64; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``; the options, what is returned and what is
    raised as for :func:`parallax_core.reference.softmax_attention`.
    Source: Parallax, arXiv 2605.29157; docs/math.md, "Attention as regression at test time".
    """
    problem, q, r, k, v = attention_arguments(
        "parallax_attention",
        q,
        k,
        v,
        r,
        scale=scale,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
    return _parallax(problem, q, r, k, v, np.empty(problem.output_shape), return_state)


def parallax_decode(
    q,
    r,
    k_cache,
    v_cache,
    *,
    cache_seqlens=None,
    cache_leftpad=None,
    page_table=None,
    window_size=None,
    scale=None,
    out=None,
    return_state=False,
):
    """Parallax attention of the newest tokens over a cache, in float64.

    q, r: ``(B, Lq, Hq, D)``; the caches, the options, what is returned and what is raised as for
    :func:`parallax_core.reference.softmax_decode`; the estimator is that of :func:`parallax_attention`.
    """
    problem, q, r, k_cache, v_cache, out = decode_arguments(
        "parallax_decode",
        q,
        k_cache,
        v_cache,
        r,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        window_size=window_size,
        scale=scale,
        out=out,
    )
    return _parallax(problem, q, r, k_cache, v_cache, out, return_state)


@np.errstate(invalid="ignore", over="ignore")
def _parallax(problem: Problem, q, r, k, v, out, return_state):
    m = np.full(problem.row_shape, -np.inf)
    d1, d2, t0 = np.zeros((3, *problem.row_shape))
    O1, O2 = np.zeros((2, *problem.output_shape))
    for block in blocks(problem, k, v):
        rows = block.rows
        weights = softmax_weights(dot_scores(problem.scale, q[rows], block.keys), block.visible)
        probe_scores = np.where(block.visible, r[rows] @ block.keys.T, 0.0)
        # The output does not depend on a constant in a row's probe scores; their mean makes c nearly 0.
        t0[rows] = (weights.p * probe_scores).sum(axis=1)
        t = np.where(block.visible, probe_scores - t0[rows][:, None], 0.0)
        c = (weights.p * t).sum(axis=1)
        out[rows] = (weights.p * (1 + c[:, None] - t)) @ block.values
        m[rows], d1[rows] = weights.m, weights.d1
        d2[rows] = (weights.e * t).sum(axis=1)
        O1[rows] = weights.e @ block.values
        O2[rows] = (weights.e * t) @ block.values
    return (out, ParallaxState(m, d1, d2, O1, O2, t0)) if return_state else out
