"""Softmax attention: the local constant (Nadaraya-Watson) estimator."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from ..state import SoftmaxState
from .arguments import attention_arguments, decode_arguments
from .rows import blocks
from .weights import dot_scores, softmax_weights


def softmax_attention(
    q, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Softmax attention in float64, ``o = sum_j p_j v_j``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``, of one dtype of float64, float32,
    float16 and bfloat16, ``Hq`` a multiple of ``Hkv``; scale: by default ``1/sqrt(D)``; causal: row ``i``
    sees the keys ``j <= Lk - Lq + i``; window_size: keep that many of the most recent keys, the current one
    included; cu_seqlens: ``(N+1,)`` int32 or int64, offsets of packed sequences.
    Returns ``o (B, Lq, Hq, Dv)`` float64, 0 in a row that sees no key; with ``return_state`` ``(o, state)``.
    Raises ValueError for shapes, ranges and lengths, TypeError for dtypes.
    Source: docs/math.md, "Attention as regression at test time".
    """
    problem, q, _, k, v = attention_arguments(
        "softmax_attention",
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )
    return _softmax(problem, q, k, v, np.empty(problem.output_shape), return_state)


def softmax_decode(
    q,
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
    """Softmax attention of the newest tokens over a cache, in float64.

    q: ``(B, Lq, Hq, D)``, the last ``Lq`` of ``cache_seqlens`` tokens; k_cache: ``(B, capacity, Hkv, D)`` and
    v_cache: ``(B, capacity, Hkv, Dv)``, or ``(num_pages, page_size, Hkv, ...)`` with page_table:
    ``(B, pages)``; cache_seqlens: ``(B,)``, valid lengths with the new tokens counted; cache_leftpad:
    ``(B,)``, keys to leave out at the front; index arrays int32 or int64; out: a float64 NumPy array
    ``(B, Lq, Hq, Dv)`` to fill; the rest as in :func:`softmax_attention`, which also says what is returned
    and raised. Always causal.
    """
    problem, q, _, k_cache, v_cache, out = decode_arguments(
        "softmax_decode",
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
    return _softmax(problem, q, k_cache, v_cache, out, return_state)


@np.errstate(invalid="ignore", over="ignore")
def _softmax(problem: Problem, q, k, v, out, return_state):
    state = SoftmaxState(
        m=np.full(problem.row_shape, -np.inf),
        d1=np.zeros(problem.row_shape),
        O1=np.zeros(problem.output_shape),
    )
    for block in blocks(problem, k, v):
        weights = softmax_weights(dot_scores(problem.scale, q[block.rows], block.keys), block.visible)
        out[block.rows] = weights.p @ block.values
        state.m[block.rows] = weights.m
        state.d1[block.rows] = weights.d1
        state.O1[block.rows] = weights.e @ block.values
    return (out, state) if return_state else out
