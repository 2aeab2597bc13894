"""From what a caller passes to a checked problem and NumPy arrays."""

from __future__ import annotations

import numpy as np

from .. import exchange
from ..problem import Problem, checked_ridge, describe_attention, describe_decode


def attention_arguments(operation, q, k, v, r=None, *, cu_seqlens=None, **options):
    """Check a call on whole sequences: the problem, and q, r (float64), k and v (as they are).

    Raises ValueError for shapes, ranges and lengths, TypeError for dtypes and for what is no CPU array.
    """
    q, k, v, r, cu_seqlens = _to_numpy(q=q, k=k, v=v, r=r, cu_seqlens=cu_seqlens)
    problem = describe_attention(operation, q, k, v, r, cu_seqlens=cu_seqlens, **options)
    return problem, _to_float64(q), _to_float64(r), k, v


def decode_arguments(
    operation, q, k_cache, v_cache, r=None, *, cache_seqlens, cache_leftpad, page_table, out, **options
):
    """Check a call on a cache: the problem, q, r (float64), the caches (as they are) and the output array."""
    q, k_cache, v_cache, r = _to_numpy(q=q, k_cache=k_cache, v_cache=v_cache, r=r)
    cache_seqlens, cache_leftpad, page_table = _to_numpy(
        cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad, page_table=page_table
    )
    problem = describe_decode(
        operation,
        q,
        k_cache,
        v_cache,
        r,
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        **options,
    )
    return problem, _to_float64(q), _to_float64(r), k_cache, v_cache, _output(out, problem)


def ridge_argument(ridge, problem: Problem, solver: str) -> np.ndarray:
    """The ridge of every row, ``(B, Lq, Hq)`` float64."""
    (ridge,) = _to_numpy(ridge=ridge) if hasattr(ridge, "__dlpack__") else (ridge,)
    return np.broadcast_to(checked_ridge(ridge, problem.row_shape, solver), problem.row_shape)


def _to_numpy(**arrays) -> list:
    return [None if x is None else exchange.to_numpy(name, x) for name, x in arrays.items()]


def _to_float64(x):
    return None if x is None else x.astype(np.float64)


def _output(out, problem: Problem) -> np.ndarray:
    if out is None:
        return np.empty(problem.output_shape)
    if not isinstance(out, np.ndarray) or out.dtype != np.float64:
        kind = f"{out.dtype} array" if isinstance(out, np.ndarray) else type(out).__name__
        raise TypeError(f"out is a {kind}; expected a float64 NumPy array")
    if out.shape != problem.output_shape:
        raise ValueError(f"out has shape {out.shape}; expected {problem.output_shape}, (B, Lq, Hq, Dv)")
    if not out.flags.writeable:
        raise ValueError("out is read-only; expected an array that can be written to")
    return out
