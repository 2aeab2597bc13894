"""The public operations: check the call, pick the backend of the arrays' device, hand back the caller's kind.

Every operation takes arrays of any framework with DLPack (NumPy, PyTorch, JAX, CuPy, ...), all of them on one
device, and returns an array of ``q``'s framework on that device. Inputs are never written to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import exchange, problem
from .errors import BackendUnavailableError
from .problem import Problem
from .state import LLAState, ParallaxState, SoftmaxState, State

MAX_HEAD_DIM = 256


def softmax_attention(
    q, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False, validate=False
):
    """Softmax attention, the local-constant (Nadaraya-Watson) estimator ``o = vbar``.

    q: ``(B, Lq, Hq, D)``; k: ``(B, Lk, Hkv, D)``; v: ``(B, Lk, Hkv, Dv)``; float64, float32, float16 or
    bfloat16, all alike; ``Hq`` a multiple of ``Hkv``; ``D`` and ``Dv`` at most 256. scale: factor of the
    scores, ``1/sqrt(D)`` by default. causal: query ``i`` sees the keys ``j <= Lk - Lq + i``. window_size:
    how many of the most recent keys a query sees, its own position included. cu_seqlens: ``(N+1,)`` int32 or
    int64 offsets of sequences packed into a batch of 1. validate: check the values of index arrays on a GPU
    too, which waits for the device; without it a row whose offsets make no sense is NaN there. On the CPU
    they are always checked.

    Returns ``o (B, Lq, Hq, Dv)`` in q's dtype, 0 in rows that see no key; with ``return_state`` the pair
    ``(o, SoftmaxState)``.

    Raises ValueError for shapes, ranges and lengths, TypeError for dtypes (float64 on a GPU), devices and
    arrays that cannot be exchanged, BackendUnavailableError where the arrays' device has no backend; each
    names the argument. MemoryError where a GPU has no room for the result.
    """
    if exchange.on_gpu(q):
        arrays = q, None, k, v, cu_seqlens, None, None, None, None, None
        return _attend_gpu("softmax_attention", arrays, scale, causal, window_size, return_state, validate)
    arrays = _arrays("softmax_attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    described = _describe("softmax_attention", arrays, scale, causal, window_size)
    return _attend(described, arrays, like=q, return_state=return_state)


def parallax_attention(
    q, r, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False,
    validate=False,
):  # fmt: skip
    """Parallax attention, softmax corrected by a probe of the key-value covariance, ``o = vbar - C_vk r``.

    r: ``(B, Lq, Hq, D)`` in q's dtype, or wider, as solved probes are: float32 or float64; a float64 probe
    is computed with in float64. Everything else, and what is raised, as for :func:`softmax_attention`; the
    state is a ParallaxState. Source: arXiv 2605.29157.
    """
    if exchange.on_gpu(q):
        arrays = q, r, k, v, cu_seqlens, None, None, None, None, None
        return _attend_gpu("parallax_attention", arrays, scale, causal, window_size, return_state, validate)
    arrays = _arrays("parallax_attention", q=q, r=r, k=k, v=v, cu_seqlens=cu_seqlens)
    described = _describe("parallax_attention", arrays, scale, causal, window_size)
    return _attend(described, arrays, like=q, return_state=return_state)


def lla_attention(
    q, k, v, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None,
    return_state=False, validate=False,
):  # fmt: skip
    """Local linear attention, ``o = vbar + C_vk u`` with ``(C_kk + ridge I) u = q - kbar``.

    ridge: a number or an array that broadcasts to ``(B, Lq, Hq)``, absolute, in squared key units. solver:
    ``cholesky``; ``cg``, matrix-free conjugate gradients; ``lstsq``, which solves in float64 and takes the
    minimum-norm ``u`` where the ridge is 0. Everything else as for :func:`softmax_attention`; the state is
    an LLAState. Source: arXiv 2510.01450.

    On a GPU ``cholesky`` is there and, for the output of half-precision heads of 64 or 128 on compute
    capability 9.0, ``cg``: conjugate gradients to a bound of the error, and the factorisation for a row where
    64 steps do not reach it. The values of a ridge that is an array are checked with ``validate`` alone, and
    a row whose system cannot be solved is NaN.

    Raises, beside what :func:`softmax_attention` does, SolverError where a system cannot be solved and
    ValueError for a ridge that is negative, or 0 without ``lstsq``.
    """
    if exchange.on_gpu(q):
        arrays = q, None, k, v, cu_seqlens, None, None, None, None
        return _solve_gpu(
            "lla_attention", arrays, ridge, solver, scale, causal, window_size, return_state, validate
        )
    arrays = _arrays("lla_attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens, ridge=ridge)
    described = _describe("lla_attention", arrays, scale, causal, window_size)
    return _attend_lla(described, arrays, ridge, solver, like=q, return_state=return_state)


def lla_probe(q, k, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None):
    """The probe ``r`` with which ``parallax_attention(q, r, k, v) == lla_attention(q, k, v)``.

    Arguments and errors as for :func:`lla_attention`. Returns ``r = -(C_kk + ridge I)^-1 (q - kbar)``,
    ``(B, Lq, Hq, D)``, float32 (float64 for float64 inputs: a solved probe rounded to half precision would
    cost percents of the output), 0 in rows that see no key. The two are equal to the bit where the probe is
    handed over in float64, in which :func:`lla_attention` sums; in float32 they differ by its rounding.
    """
    if exchange.on_gpu(q):
        arrays = q, None, k, None, cu_seqlens, None, None, None, None
        return _solve_gpu("lla_probe", arrays, ridge, solver, scale, causal, window_size, False, False)
    arrays = _arrays("lla_probe", q=q, k=k, cu_seqlens=cu_seqlens, ridge=ridge)
    described = _describe("lla_probe", arrays, scale, causal, window_size)
    lam = problem.checked_ridge(arrays.get("ridge", ridge), described.row_shape, solver)
    from .cpu import lla

    probe = lla.solve_probe(described, arrays["q"], arrays["k"], lam, solver)
    return _result(probe, described.compute_dtype, like=q)


def local_attention(
    q, k, v, *, probe, scale=None, bandwidth=None, kernel="dot", intercept=True, amplification=False,
    ridge=None, solver="cholesky", causal=True, window_size=None, cu_seqlens=None,
):  # fmt: skip
    """Any member of the family of local estimators, by bandwidth, kernel, probe and affine structure.

    probe: None, ``"query"`` (``r = -q``), ``"solve"`` (the ridge system, needs ``ridge``) or an array
    ``(B, Lq, Hq, D)``. scale or bandwidth: ``scale = 1/bandwidth**2``. kernel: ``"dot"``,
    ``exp(scale q.k)``, or ``"gaussian"``, ``exp(-scale/2 |q - k|^2)``. intercept: ``o = vbar - C_vk r``
    about the weighted means, or without, ``o = -M_vk r`` on raw moments. amplification: divide the
    correction by ``1 - alpha``, ``alpha = r.(kbar - q)``. Everything else as for :func:`lla_attention`.
    Returns ``o (B, Lq, Hq, Dv)``. Source: docs/math.md, "The family".

    Raises, beside what :func:`lla_attention` does, ValueError for combinations that mean nothing: no probe
    without an intercept, amplification without a probe or without an intercept, a ridge without a solve, a
    negative scale with the Gaussian kernel.
    """
    given = probe if not (probe is None or isinstance(probe, str)) else None
    arrays = _arrays("local_attention", q=q, k=k, v=v, probe=given, cu_seqlens=cu_seqlens, ridge=ridge)
    arrays["r"] = arrays.pop("probe", None)
    scale = problem.checked_bandwidth(scale, bandwidth, max(1, q.shape[-1] if len(q.shape) else 1))
    described = _describe("local_attention", arrays, scale, causal, window_size)
    problem.check_family(probe, kernel, intercept, amplification, ridge, described.scale)
    from .cpu import forward, lla

    r = arrays["r"]
    dtype = described.compute_dtype
    if isinstance(probe, str) and probe == "query":
        r = np.negative(arrays["q"])
    elif isinstance(probe, str):
        lam = problem.checked_ridge(arrays.get("ridge", ridge), described.row_shape, solver)
        r = lla.solve_probe(
            described, arrays["q"], arrays["k"], lam, solver, kernel=kernel, intercept=intercept
        )
        dtype = lla.WIDE
    out, _ = forward.attend(
        described, arrays["q"], arrays["k"], arrays["v"], r, kernel=kernel, intercept=intercept,
        amplification=amplification, dtype=dtype,
    )  # fmt: skip
    return _result(out, described.dtype, like=q)


def softmax_decode(
    q, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, out=None, return_state=False, validate=False, split_size=None,
):  # fmt: skip
    """Softmax attention of new tokens against a key-value cache that holds their keys already; causal.

    q: ``(B, Lq, Hq, D)``, the last ``Lq`` tokens of each sequence; k_cache, v_cache:
    ``(B, capacity, Hkv, D)`` and ``(B, capacity, Hkv, Dv)``, or ``(num_pages, page_size, Hkv, ...)`` with
    a page table. cache_seqlens: ``(B,)`` valid lengths with the new tokens counted, the capacity by
    default. cache_leftpad: ``(B,)`` keys to leave out at the front. page_table: ``(B, pages)``, the page of
    each stretch of ``page_size`` positions; entries beyond a sequence's length are never read. window_size:
    how many of the most recent keys a query sees. out: an array of the output's shape and dtype to write
    to. Index arrays are int32 or int64. What lies outside a sequence's valid keys may hold anything.
    validate: check the values of index arrays on a GPU too, which waits for the device; without it a sequence
    with an invalid length or page is NaN there, and nothing outside the arrays is read. On the CPU they are
    always checked. split_size: keys a split of a cache on a GPU, a positive multiple of 16; with it the
    result's bits for a sequence do not depend on the batch that it sits in. On the CPU it changes nothing:
    there they never do.

    Returns ``o (B, Lq, Hq, Dv)``, or ``(o, SoftmaxState)``. Raises as :func:`softmax_attention` does.
    """
    if exchange.on_gpu(q):
        arrays = q, None, k_cache, v_cache, None, cache_seqlens, cache_leftpad, page_table, out, None
        return _attend_gpu(
            "softmax_decode", arrays, scale, True, window_size, return_state, validate, split_size
        )
    problem.checked_split_size(split_size)
    arrays = _cache_arrays(
        "softmax_decode", q, k_cache, v_cache, cache_seqlens, cache_leftpad, page_table, out
    )
    described = _describe_decode("softmax_decode", arrays, scale, window_size)
    return _attend(described, arrays, like=q, out=out, return_state=return_state)


def parallax_decode(
    q, r, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, out=None, return_state=False, validate=False, split_size=None,
):  # fmt: skip
    """Parallax attention of new tokens against a key-value cache; causal.

    r: as for :func:`parallax_attention`. Everything else as for :func:`softmax_decode`; the state is a
    ParallaxState.
    """
    if exchange.on_gpu(q):
        arrays = q, r, k_cache, v_cache, None, cache_seqlens, cache_leftpad, page_table, out, None
        return _attend_gpu(
            "parallax_decode", arrays, scale, True, window_size, return_state, validate, split_size
        )
    problem.checked_split_size(split_size)
    arrays = _cache_arrays(
        "parallax_decode", q, k_cache, v_cache, cache_seqlens, cache_leftpad, page_table, out, r=r
    )
    described = _describe_decode("parallax_decode", arrays, scale, window_size)
    return _attend(described, arrays, like=q, out=out, return_state=return_state)


def lla_decode(
    q, k_cache, v_cache, *, ridge, solver="cholesky", cache_seqlens=None, cache_leftpad=None, page_table=None,
    window_size=None, scale=None, out=None, return_state=False, validate=False, split_size=None,
):  # fmt: skip
    """Local linear attention of new tokens against a key-value cache; causal.

    ridge, solver: as for :func:`lla_attention`. Everything else as for :func:`softmax_decode`; the state is
    an LLAState.
    """
    if exchange.on_gpu(q):
        arrays = q, None, k_cache, v_cache, None, cache_seqlens, cache_leftpad, page_table, out
        return _solve_gpu(
            "lla_decode", arrays, ridge, solver, scale, True, window_size, return_state, validate, split_size
        )
    problem.checked_split_size(split_size)
    arrays = _cache_arrays(
        "lla_decode", q, k_cache, v_cache, cache_seqlens, cache_leftpad, page_table, out, ridge=ridge
    )
    described = _describe_decode("lla_decode", arrays, scale, window_size)
    return _attend_lla(described, arrays, ridge, solver, like=q, out=out, return_state=return_state)


def softmax_attention_backward(
    do, q, k, v, o, state, *, scale=None, causal=True, window_size=None, cu_seqlens=None
):
    """Gradients of a loss by the inputs of :func:`softmax_attention`.

    do: ``(B, Lq, Hq, Dv)`` in q's dtype, the gradient of the loss by ``o``. o, state: what the forward call
    returned with ``return_state``; state None computes it again. Everything else as for the forward call.

    Returns ``dq, dk, dv`` in the shapes and dtype of q, k and v; rows that see no key, and keys that no row
    sees, have gradients of 0. The same bits come out on any number of threads. Source: docs/math.md,
    "Gradients".

    Raises, beside what the forward call does, TypeError for a state of another kind and ValueError for a
    gradient, an output or a state of another problem's shape.
    """
    arrays = _arrays("softmax_attention_backward", q=q, k=k, v=v, cu_seqlens=cu_seqlens, do=do, o=o)
    described = _describe("softmax_attention_backward", arrays, scale, causal, window_size)
    state = _checked_gradient(described, arrays, state, SoftmaxState)
    from .cpu import gradients

    gradient = gradients.softmax_backward(described, *(arrays[n] for n in ("do", "q", "k", "v")), state)
    return tuple(_result(x, described.dtype, like=q) for x in gradient)


def parallax_attention_backward(
    do, q, r, k, v, o, state, *, scale=None, causal=True, window_size=None, cu_seqlens=None
):
    """Gradients of a loss by the inputs of :func:`parallax_attention`.

    Arguments and errors as for :func:`softmax_attention_backward`, the state a ParallaxState. Returns
    ``dq, dr, dk, dv``, dr in the dtype of r.
    """
    arrays = _arrays("parallax_attention_backward", q=q, r=r, k=k, v=v, cu_seqlens=cu_seqlens, do=do, o=o)
    described = _describe("parallax_attention_backward", arrays, scale, causal, window_size)
    state = _checked_gradient(described, arrays, state, ParallaxState)
    from .cpu import gradients

    given = (arrays[name] for name in ("do", "q", "r", "k", "v"))
    gradient = gradients.parallax_backward(described, *given, state)
    dtypes = described.dtype, arrays["r"].dtype, described.dtype, described.dtype
    return tuple(_result(x, dtype, like=q) for x, dtype in zip(gradient, dtypes))


def lla_attention_backward(
    do, q, k, v, o, state, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None,
    cu_seqlens=None,
):  # fmt: skip
    """Gradients of a loss by the inputs of :func:`lla_attention` and by its ridge.

    Arguments and errors as for :func:`softmax_attention_backward`, ridge and solver as for the forward call,
    the state an LLAState or None: it is only checked, since the weights and slopes cost less to compute again
    than to keep. At a ridge of 0 the keys of every row must span the space; SolverError otherwise. Returns
    ``dq, dk, dv, dridge``, dridge ``(B, Lq, Hq)`` float32 (float64 for float64 inputs).
    """
    arrays = _arrays("lla_attention_backward", q=q, k=k, v=v, cu_seqlens=cu_seqlens, do=do, o=o, ridge=ridge)
    described = _describe("lla_attention_backward", arrays, scale, causal, window_size)
    lam = problem.checked_ridge(arrays.get("ridge", ridge), described.row_shape, solver)
    _checked_gradient(described, arrays, state, LLAState)
    from .cpu import gradients

    given = (arrays[name] for name in ("do", "q", "k", "v"))
    *gradient, dridge = gradients.lla_backward(described, *given, lam, solver)
    return (
        *(_result(x, described.dtype, like=q) for x in gradient),
        _result(dridge, described.compute_dtype, like=q),
    )


def _checked_gradient(described: Problem, arrays, state, kind):
    """The state as NumPy arrays, computed again where there is none, after every check of a gradient."""
    if isinstance(state, State):
        state = type(state)(*(exchange.to_numpy(f"state.{n}", x) for n, x in zip(state._fields, state)))
    problem.check_gradient(described, arrays["do"], arrays["o"], state, kind)
    if state is not None or kind is LLAState:
        return state
    from .cpu import forward

    return forward.attend(
        described, arrays["q"], arrays["k"], arrays["v"], arrays.get("r"), return_state=True
    )[1]


_OPTIONAL = {"cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table", "out", "probe"}


def _arrays(operation: str, **given: Any) -> dict[str, np.ndarray]:
    """The arrays of a call on the CPU as NumPy arrays; options that are None and numbers are left out."""
    present = {
        name: x
        for name, x in given.items()
        if not (x is None and name in _OPTIONAL) and not (name == "ridge" and not _is_array(x))
    }
    devices = {name: exchange.device(name, x) for name, x in present.items()}
    for name, where in devices.items():
        if where != devices["q"]:
            raise TypeError(
                f"{name} is on {exchange.device_name(where)}; "
                f"expected {exchange.device_name(devices['q'])}, where q is"
            )
    _require_backend(devices["q"])
    if devices["q"][0] != exchange.CPU:
        raise BackendUnavailableError(
            f"q is on {exchange.device_name(devices['q'])}, and {operation} has no CUDA kernel yet; "
            "pass arrays on the CPU (nothing is copied between devices unasked)"
        )
    return {name: exchange.to_numpy(name, x) for name, x in present.items()}


def _is_array(x) -> bool:
    return any(hasattr(x, a) for a in ("__dlpack__", "__cuda_array_interface__"))


def _cache_arrays(
    operation, q, k_cache, v_cache, cache_seqlens, cache_leftpad, page_table, out, **more
):  # fmt: skip
    arrays = _arrays(
        operation, q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad, page_table=page_table, out=out, **more,
    )  # fmt: skip
    if out is not None and exchange.is_immutable(out):
        raise ValueError("out is read-only; expected an array that can be written to")
    arrays["k"], arrays["v"] = arrays.pop("k_cache"), arrays.pop("v_cache")
    return arrays


def _attend_gpu(
    operation, arrays, scale, causal, window_size, return_state, validate, split_size=None, ridge=None,
    solver=None,
):  # fmt: skip
    global _gpu_calls
    if _gpu_calls is None:
        _require_backend(exchange.device("q", arrays[0]))
        from .cuda_kernels import calls

        _gpu_calls = calls
    options = scale, causal, window_size, split_size, ridge, solver
    return _gpu_calls.attend(operation, arrays, options, return_state, validate)


def _solve_gpu(
    operation, arrays, ridge, solver, scale, causal, window_size, return_state, validate, split_size=None
):  # fmt: skip
    """The same with a ridge, which is a number or one more of the arrays."""
    given, number = (ridge, None) if _is_array(ridge) else (None, ridge)
    return _attend_gpu(
        operation, (*arrays, given), scale, causal, window_size, return_state, validate, split_size, number,
        solver,
    )  # fmt: skip


# The module parallax_core.cuda_kernels.calls, once an array on a GPU was passed: an import statement costs
# every call 0.5 us.
_gpu_calls: Any = None


def _require_backend(device: tuple[int, int]) -> None:
    """Raise BackendUnavailableError where no backend can take arrays of a device."""
    if device[0] == exchange.CPU:
        return
    if device[0] not in (exchange.CUDA, exchange.CUDA_MANAGED):
        raise BackendUnavailableError(
            f"q is on {exchange.device_name(device)}, which has no backend; expected the CPU or an NVIDIA GPU"
        )
    from . import cuda_kernels

    reason = cuda_kernels.availability()
    if reason is not None:
        raise BackendUnavailableError(f"q is on {exchange.device_name(device)}, and {reason}")


def _describe(operation: str, arrays: dict[str, np.ndarray], scale, causal, window_size) -> Problem:
    return problem.describe_attention(
        operation, arrays["q"], arrays["k"], arrays.get("v"), arrays.get("r"), scale=scale, causal=causal,
        window_size=window_size, cu_seqlens=arrays.get("cu_seqlens"), max_head_dim=MAX_HEAD_DIM,
    )  # fmt: skip


def _describe_decode(operation: str, arrays: dict[str, np.ndarray], scale, window_size) -> Problem:
    described = problem.describe_decode(
        operation, arrays["q"], arrays["k"], arrays["v"], arrays.get("r"), scale=scale,
        window_size=window_size, cache_seqlens=arrays.get("cache_seqlens"),
        cache_leftpad=arrays.get("cache_leftpad"), page_table=arrays.get("page_table"),
        max_head_dim=MAX_HEAD_DIM,
    )  # fmt: skip
    if "out" in arrays:
        _check_out(arrays, described)
    return described


def _check_out(arrays: dict[str, np.ndarray], described: Problem) -> None:
    out = arrays["out"]
    problem.check_out(described, out)
    if not out.flags.writeable:
        raise ValueError("out is read-only; expected an array that can be written to")
    for name, x in arrays.items():
        if name != "out" and np.may_share_memory(out, x):
            raise ValueError(f"out overlaps {name} in memory; inputs are never written to")


def _attend(described: Problem, arrays, *, like, return_state, out=None):
    from .cpu import forward

    o, state = forward.attend(
        described,
        arrays["q"],
        arrays["k"],
        arrays["v"],
        arrays.get("r"),
        return_state=return_state,
    )
    return _outcome(o, state, described, arrays, like, out)


def _attend_lla(described: Problem, arrays, ridge, solver, *, like, return_state, out=None):
    lam = problem.checked_ridge(arrays.get("ridge", ridge), described.row_shape, solver)
    from .cpu import lla

    o, state = lla.attend(
        described, arrays["q"], arrays["k"], arrays["v"], lam, solver, return_state=return_state
    )
    return _outcome(o, state, described, arrays, like, out)


def _outcome(o, state, described: Problem, arrays, like, out):
    if out is None:
        o = _result(o, described.dtype, like)
    else:
        _round_into(arrays["out"], o)
        o = out
    if state is None:
        return o
    return o, type(state)(*(exchange.hand_back(x, like) for x in state))


def _result(o: np.ndarray, dtype: np.dtype, like):
    if o.dtype != dtype:
        rounded = exchange.empty(o.shape, dtype)
        _round_into(rounded, o)
        o = rounded
    return exchange.hand_back(o, like)


def _round_into(to: np.ndarray, o: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(to, o, casting="unsafe")
