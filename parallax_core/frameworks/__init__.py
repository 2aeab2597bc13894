"""Differentiable operations for one framework each: ``frameworks.torch`` and ``frameworks.jax``.

Neither is imported before it is asked for. Both hand their arrays to the public operations of
:mod:`parallax_core`, which pick the backend, and only add what their framework's tracing needs to know
beforehand.
"""

from __future__ import annotations

from ..state import LLAState, ParallaxState, SoftmaxState


def state_shapes(kind, rows, head_dim, value_dim):
    """The shapes of a state's arrays, in a state of that kind.

    kind: SoftmaxState, ParallaxState or LLAState; rows: ``(B, Lq, Hq)``; head_dim, value_dim: ``D``, ``Dv``.
    """
    rows = tuple(rows)
    keys, values = (*rows, head_dim), (*rows, value_dim)
    if kind is SoftmaxState:
        return SoftmaxState(m=rows, d1=rows, O1=values)
    if kind is ParallaxState:
        return ParallaxState(m=rows, d1=rows, d2=rows, O1=values, O2=values, t0=rows)
    return LLAState(
        m=rows, d1=rows, k0=keys, wk=keys, wv=values, wkk=(*keys, head_dim), wvk=(*values, head_dim),
        q=keys, ridge=rows,
    )  # fmt: skip
