"""The operations of parallax_core for JAX: differentiable, and usable inside ``jax.jit`` and ``jax.vmap``.

Each hands its arrays to the public operation of the same name through a callback. Shapes, dtypes and options
are checked while JAX traces; values that are traced (lengths, a ridge) are checked when the callback runs,
and what it raises then arrives as JAX's own runtime error with the message inside. ``jax.vmap`` runs the
mapped calls one after another.

Callbacks are for the CPU: JAX would copy a GPU's arrays to the host and back for one. Here, compiling for
any other platform is a BackendUnavailableError instead.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any

from ..errors import BackendUnavailableError

try:
    import jax
except ImportError as error:
    raise BackendUnavailableError(
        "parallax_core.frameworks.jax needs JAX: pip install 'parallax-core[jax]'"
    ) from error
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import parallax_core as plx

from .. import problem
from ..attention import MAX_HEAD_DIM
from ..state import LLAState, ParallaxState, SoftmaxState
from . import state_shapes

__all__ = [
    "lla_attention",
    "lla_decode",
    "lla_probe",
    "local_attention",
    "parallax_attention",
    "parallax_decode",
    "softmax_attention",
    "softmax_decode",
]


def softmax_attention(
    q, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Softmax attention of JAX arrays; see :func:`parallax_core.softmax_attention`.

    Differentiable by q, k and v, in reverse mode and once. The state is not: differentiating it is a
    TypeError. Returns ``o``, or ``(o, SoftmaxState)``.

    Raises what the public operation does, and BackendUnavailableError when compiled for another platform than
    the CPU.
    """
    arrays = _arrays(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    described = _describe("softmax_attention", arrays, scale, causal, window_size)
    return _attend(described, SoftmaxState, arrays, {}, return_state)


def parallax_attention(
    q, r, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Parallax attention of JAX arrays; see :func:`parallax_core.parallax_attention`.

    Differentiable by q, r, k and v. Everything else as for :func:`softmax_attention`; the state is a
    ParallaxState.
    """
    arrays = _arrays(q=q, r=r, k=k, v=v, cu_seqlens=cu_seqlens)
    described = _describe("parallax_attention", arrays, scale, causal, window_size)
    return _attend(described, ParallaxState, arrays, {}, return_state)


def lla_attention(
    q, k, v, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None,
    return_state=False,
):  # fmt: skip
    """Local linear attention of JAX arrays; see :func:`parallax_core.lla_attention`.

    ridge: a number, or an array that broadcasts to ``(B, Lq, Hq)``. Differentiable by q, k, v and a ridge
    that is an array. Everything else as for :func:`softmax_attention`; the state is an LLAState.
    """
    arrays = _arrays(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    described = _describe("lla_attention", arrays, scale, causal, window_size)
    system, arrays["ridge"] = _checked_ridge(ridge, solver, described)
    return _attend(described, LLAState, arrays, system, return_state)


def lla_probe(q, k, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None):
    """The probe that makes Parallax attention local linear attention; see :func:`parallax_core.lla_probe`.

    Not differentiable: a gradient through it is a TypeError. :func:`lla_attention` solves the same probe and
    is differentiable through it.
    """
    arrays = _arrays(q=q, k=k, cu_seqlens=cu_seqlens)
    described = _describe("lla_probe", arrays, scale, causal, window_size)
    system, arrays["ridge"] = _checked_ridge(ridge, solver, described)
    results = jax.ShapeDtypeStruct(q.shape, described.compute_dtype)
    return _undifferentiated(_call(described, system, results), arrays)


def local_attention(
    q, k, v, *, probe, scale=None, bandwidth=None, kernel="dot", intercept=True, amplification=False,
    ridge=None, solver="cholesky", causal=True, window_size=None, cu_seqlens=None,
):  # fmt: skip
    """Any member of the family of local estimators; see :func:`parallax_core.local_attention`.

    Not differentiable: a gradient through it is a TypeError. The members with the dot kernel, an intercept
    and no amplification are :func:`softmax_attention`, :func:`parallax_attention` and :func:`lla_attention`,
    which are.
    """
    named = probe is None or isinstance(probe, str)
    arrays = _arrays(q=q, k=k, v=v, probe=None if named else probe, cu_seqlens=cu_seqlens)
    scale = problem.checked_bandwidth(scale, bandwidth, max(1, q.shape[-1] if q.ndim else 1))
    described = _describe("local_attention", {**arrays, "r": arrays["probe"]}, scale, causal, window_size)
    problem.check_family(probe, kernel, intercept, amplification, ridge, described.scale)
    family = {"kernel": kernel, "intercept": intercept, "amplification": amplification}
    if named:
        family["probe"] = probe
    if ridge is not None:
        system, arrays["ridge"] = _checked_ridge(ridge, solver, described)
        family.update(system)
    results = jax.ShapeDtypeStruct(described.output_shape, described.dtype)
    return _undifferentiated(_call(described, family, results), arrays)


def softmax_decode(
    q, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, return_state=False,
):  # fmt: skip
    """Softmax attention of new tokens against a JAX cache; see :func:`parallax_core.softmax_decode`.

    There is no ``out``, since JAX's arrays cannot be written to. Not differentiable: a gradient through it is
    a TypeError. Returns ``o``, or ``(o, SoftmaxState)``.
    """
    arrays = _arrays(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad,
        page_table=page_table,
    )  # fmt: skip
    return _decode("softmax_decode", SoftmaxState, arrays, None, window_size, scale, return_state)


def parallax_decode(
    q, r, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, return_state=False,
):  # fmt: skip
    """Parallax attention of new tokens against a JAX cache; see :func:`parallax_core.parallax_decode`.

    Everything else as for :func:`softmax_decode`; the state is a ParallaxState.
    """
    arrays = _arrays(
        q=q, r=r, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad,
        page_table=page_table,
    )  # fmt: skip
    return _decode("parallax_decode", ParallaxState, arrays, None, window_size, scale, return_state)


def lla_decode(
    q, k_cache, v_cache, *, ridge, solver="cholesky", cache_seqlens=None, cache_leftpad=None, page_table=None,
    window_size=None, scale=None, return_state=False,
):  # fmt: skip
    """Local linear attention of new tokens against a JAX cache; see :func:`parallax_core.lla_decode`.

    Everything else as for :func:`softmax_decode`; the state is an LLAState.
    """
    arrays = _arrays(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad,
        page_table=page_table,
    )  # fmt: skip
    return _decode("lla_decode", LLAState, arrays, (ridge, solver), window_size, scale, return_state)


@dataclasses.dataclass(frozen=True)
class _Host:
    """A public operation with its options, on NumPy arrays; equal to its like, so that JAX caches."""

    operation: str
    options: tuple[tuple[str, Any], ...]

    def __call__(self, arrays: dict[str, Any]):
        arrays = jax.tree.map(lambda x: _float64(np.asarray(x)), arrays)
        results = getattr(plx, self.operation)(**arrays, **dict(self.options))
        return jax.tree.map(_halves, results)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A public operation on traced arrays; results: the shapes and dtypes of what it returns."""

    operation: str
    options: tuple[tuple[str, Any], ...]
    results: Any

    def __call__(self, arrays: dict[str, Any]):
        given = {name: x for name, x in arrays.items() if x is not None}
        given = jax.tree.map(lambda x: _halves(_cpu_only.bind(x)), given)
        host = _Host(self.operation, self.options)
        results = jax.tree.map(_halves_shape, self.results)
        return jax.tree.map(_float64, jax.pure_callback(host, results, given, vmap_method="sequential"))


# JAX runs a callback on threads that do not know of ``with jax.enable_x64``, and would round float64 to
# float32 on its way in and out; as pairs of uint32 it comes through.
def _halves(x):
    if x.dtype != np.float64:
        return x
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x)[..., None].view(np.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _halves_shape(x):
    return jax.ShapeDtypeStruct((*x.shape, 2), np.uint32) if x.dtype == np.float64 else x


def _float64(x):
    if x.dtype != np.uint32:
        return x
    if isinstance(x, np.ndarray):
        return x.view(np.float64)[..., 0]
    return jax.lax.bitcast_convert_type(x, jnp.float64)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """A differentiable operation: its call, the same with its state, and that of its gradient."""

    plain: _Call
    stated: _Call
    backward: _Call
    return_state: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(attention: _Attention, arrays):
    return (attention.stated if attention.return_state else attention.plain)(arrays)


def _attention_forward(attention: _Attention, arrays):
    arrays = jax.custom_derivatives.custom_vjp_primal_tree_values(arrays)
    # The gradient of LLA computes again what it needs.
    if "ridge" in arrays and not attention.return_state:
        o, state = attention.plain(arrays), None
    else:
        o, state = attention.stated(arrays)
    return (o, state) if attention.return_state else o, (arrays, o, state)


def _attention_backward(attention: _Attention, residuals, cotangents):
    arrays, o, state = residuals
    operation = attention.plain.operation
    if attention.return_state:
        do, dstate = cotangents
        for name, x in zip(dstate._fields, dstate):
            if not isinstance(x, SymbolicZero):
                raise TypeError(
                    f"state.{name} is differentiated, and the state of {operation} has no gradient; "
                    "use jax.lax.stop_gradient on the state"
                )
    else:
        do = cotangents
    if isinstance(do, SymbolicZero):
        do = jnp.zeros(o.shape, o.dtype)
    if isinstance(state, LLAState):
        state = None
    given = {"do": do, **arrays, "o": o}
    if state is None:
        options = (*attention.backward.options, ("state", None))
        gradients = dataclasses.replace(attention.backward, options=options)(given)
    else:
        gradients = attention.backward({**given, "state": state})
    by_name = dict(zip((n for n in ("q", "r", "k", "v", "ridge") if n in arrays), gradients))
    return (
        {
            name: by_name[name].astype(x.dtype)
            if name in by_name and x is not None and jnp.issubdtype(x.dtype, jnp.floating)
            else None
            for name, x in arrays.items()
        },
    )


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _undifferentiated(call: _Call, arrays):
    return call(arrays)


def _refuse_gradient(call: _Call, arrays):
    name = next(name for name, x in arrays.items() if x is not None and x.perturbed)
    raise TypeError(
        f"{name} is differentiated, and {call.operation} has no gradient; "
        "use jax.lax.stop_gradient on its inputs"
    )


_undifferentiated.defvjp(_refuse_gradient, lambda call, residuals, cotangents: None, symbolic_zeros=True)


# An identity that only the CPU's compiler knows.
_cpu_only = Primitive("parallax_core_cpu_only")
_cpu_only.def_abstract_eval(lambda x: x)
batching.defvectorized(_cpu_only)


def _refuse_second_derivative(primals, tangents):
    # A first derivative is a rule of the whole operation's; only one of that rule comes by here.
    raise TypeError(
        "the operations of parallax_core.frameworks.jax have first derivatives alone, and a second one is "
        "asked for; use jax.lax.stop_gradient on the first"
    )


ad.primitive_jvps[_cpu_only] = _refuse_second_derivative


@_cpu_only.def_impl
def _(x):
    x = jnp.asarray(x)  # constants come as JAX's own kind of NumPy array, on no device yet
    _refuse_platforms(device.platform for device in x.devices())
    return x


def _lower_elsewhere(context, x):
    _refuse_platforms(context.module_context.platforms)
    return [x]


mlir.register_lowering(_cpu_only, lambda context, x: [x], platform="cpu")
mlir.register_lowering(_cpu_only, _lower_elsewhere)


def _refuse_platforms(platforms) -> None:
    for platform in platforms:
        if platform != "cpu":
            raise BackendUnavailableError(
                f"parallax_core.frameworks.jax has no backend for JAX's platform {platform!r}, "
                "only for 'cpu'; "
                "put the arrays on jax.devices('cpu'), or hand them to parallax_core itself outside jax.jit"
            )


def _arrays(**given) -> dict[str, Any]:
    optional = "probe", "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table"
    return {n: x if x is None and n in optional else _array(n, x) for n, x in given.items()}


def _array(name: str, x) -> jax.Array:
    if isinstance(x, np.ndarray):
        # Without x64 JAX would make it narrower.
        narrow = jax.dtypes.canonicalize_dtype(x.dtype)
        if narrow != x.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype}, which JAX would cast to {narrow}; "
                "cast it, or set jax_enable_x64"
            )
        return jnp.asarray(x)
    if not isinstance(x, jax.Array):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a jax.Array or a NumPy array")
    return x


def _known(*arrays) -> bool:
    """Whether the values of all index arrays can be read here, without a copy from a device."""
    return not any(
        isinstance(x, jax.core.Tracer) or any(d.platform != "cpu" for d in jnp.asarray(x).devices())
        for x in arrays
        if x is not None
    )


def _describe(operation, arrays, scale, causal, window_size):
    cu_seqlens = arrays["cu_seqlens"]
    if cu_seqlens is not None and _known(cu_seqlens):
        cu_seqlens = np.asarray(cu_seqlens)
    elif cu_seqlens is not None:
        # One sequence that fills the length stands for offsets that nobody knows yet.
        cu_seqlens = np.zeros(cu_seqlens.shape, cu_seqlens.dtype)
        cu_seqlens[..., -1:] = arrays["q"].shape[1] if arrays["q"].ndim > 1 else 0
    return problem.describe_attention(
        operation, arrays["q"], arrays["k"], arrays.get("v"), arrays.get("r"), scale=scale, causal=causal,
        window_size=window_size, cu_seqlens=cu_seqlens, max_head_dim=MAX_HEAD_DIM,
    )  # fmt: skip


def _decode(operation, kind, arrays, system, window_size, scale, return_state):
    index = {name: arrays[name] for name in ("cache_seqlens", "cache_leftpad", "page_table")}
    read = np.asarray if _known(*index.values()) else lambda x: np.zeros(x.shape, x.dtype)
    described = problem.describe_decode(
        operation, arrays["q"], arrays["k_cache"], arrays["v_cache"], arrays.get("r"), scale=scale,
        window_size=window_size, max_head_dim=MAX_HEAD_DIM,
        **{name: None if x is None else read(x) for name, x in index.items()},
    )  # fmt: skip
    options = {"return_state": return_state}
    if system is not None:
        solved, arrays["ridge"] = _checked_ridge(*system, described)
        options.update(solved)
    results = _results(described, kind)
    return _undifferentiated(_call(described, options, results if return_state else results[0]), arrays)


def _checked_ridge(ridge, solver, described):
    """The options of a ridge system, and its ridge where that is an array."""
    rows = described.row_shape
    if isinstance(ridge, numbers.Real) or not hasattr(ridge, "shape"):
        problem.checked_ridge(ridge, rows, solver)
        if not isinstance(ridge, numbers.Real):
            raise TypeError(f"ridge must be a number or an array, got a {type(ridge).__name__}")
        return {"ridge": float(ridge), "solver": solver}, None
    ridge = _array("ridge", ridge)
    if not any(jnp.issubdtype(ridge.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"ridge has dtype {ridge.dtype}; expected real numbers")
    problem.checked_ridge(np.asarray(ridge) if _known(ridge) else np.ones(ridge.shape), rows, solver)
    if not jnp.issubdtype(ridge.dtype, jnp.floating):
        ridge = ridge.astype(described.compute_dtype)
    return {"solver": solver}, jnp.broadcast_to(ridge, rows)


def _results(described, kind):
    dtype = described.compute_dtype
    shapes = state_shapes(kind, described.row_shape, described.head_dim, described.value_dim)
    state = kind(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    return jax.ShapeDtypeStruct(described.output_shape, described.dtype), state


def _call(described, options, results) -> _Call:
    options = {"scale": described.scale, "window_size": described.window_size, **options}
    if not described.operation.endswith("_decode"):
        options["causal"] = described.causal
    return _Call(described.operation, tuple(options.items()), results)


def _attend(described, kind, arrays, system, return_state):
    results = _results(described, kind)
    backward = dataclasses.replace(described, operation=f"{described.operation}_backward")
    gradients = [
        jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in "qrkv" if name in arrays
    ]
    if kind is LLAState:
        gradients.append(jax.ShapeDtypeStruct(described.row_shape, described.compute_dtype))
    attention = _Attention(
        _call(described, system, results[0]),
        _call(described, {**system, "return_state": True}, results),
        _call(backward, system, tuple(gradients)),
        bool(return_state),
    )
    return _attention(attention, arrays)
