"""The operations of parallax_core for PyTorch: differentiable, and opaque to ``torch.compile``.

Each is a custom operator in the namespace ``parallax_core`` that hands its tensors to the public operation of
the same name. ``torch.compile(fullgraph=True)``, ``torch.export`` and autocast take them as one node of the
graph; under autocast q, k and v are cast to its dtype, as matrix products are, and a float32 probe or ridge
stays as it is. Shapes and options are checked when an operator runs, not when it is traced. ``torch.vmap``
runs the mapped calls one after another.

Gradients are those of reverse mode, once: a tensor with a tangent of forward mode is a TypeError, a second
derivative a RuntimeError. The derivatives of ``torch.func`` are PyTorch's own error: custom operators have
none.
"""

from __future__ import annotations

import numbers

try:
    import torch
except ImportError as error:
    from ..errors import BackendUnavailableError

    raise BackendUnavailableError(
        "parallax_core.frameworks.torch needs PyTorch: pip install 'parallax-core[torch]'"
    ) from error
from torch.autograd import forward_ad
from torch.utils import _pytree

import parallax_core as plx

from .. import problem
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

_WHOLE = "float? scale, bool causal, SymInt? window_size, Tensor? cu_seqlens"
_CACHE = "Tensor? cache_seqlens, Tensor? cache_leftpad, Tensor? page_table, SymInt? window_size, float? scale"
# A number stays a number: as a tensor on a GPU its value could not be checked without a synchronisation.
_RIDGE = "Tensor? ridge, float? ridge_number, str solver"

# torch.export saves a NamedTuple under a name that it was told.
for _kind in (SoftmaxState, ParallaxState, LLAState):
    _pytree._register_namedtuple(_kind, serialized_type_name=f"parallax_core.{_kind.__name__}")


def softmax_attention(
    q, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Softmax attention of tensors; see :func:`parallax_core.softmax_attention`.

    Differentiable by q, k and v. The state is not: with ``return_state`` an input that requires gradients is
    a TypeError. Returns ``o``, or ``(o, SoftmaxState)``; raises as the public operation does.
    """
    _check_tensors(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    graph = _in_graph("softmax_attention", return_state, q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    options = *_checked_options(scale, causal, window_size), cu_seqlens
    return _outcome(_softmax_attention(q, k, v, *options, graph or return_state), SoftmaxState, return_state)


def parallax_attention(
    q, r, k, v, *, scale=None, causal=True, window_size=None, cu_seqlens=None, return_state=False
):
    """Parallax attention of tensors; see :func:`parallax_core.parallax_attention`.

    Differentiable by q, r, k and v; a probe in float32 beside narrower inputs has its gradient in float32.
    Everything else as for :func:`softmax_attention`; the state is a ParallaxState.
    """
    _check_tensors(q=q, r=r, k=k, v=v, cu_seqlens=cu_seqlens)
    graph = _in_graph("parallax_attention", return_state, q=q, r=r, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    options = *_checked_options(scale, causal, window_size), cu_seqlens
    results = _parallax_attention(q, _autocast_probe(r), k, v, *options, graph or return_state)
    return _outcome(results, ParallaxState, return_state)


def lla_attention(
    q, k, v, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None,
    return_state=False,
):  # fmt: skip
    """Local linear attention of tensors; see :func:`parallax_core.lla_attention`.

    ridge: a number, or a tensor that broadcasts to ``(B, Lq, Hq)``. Differentiable by q, k, v and a ridge
    that is a tensor. Everything else as for :func:`softmax_attention`; the state is an LLAState.
    """
    ridge, *system = _checked_ridge(ridge, solver)
    _check_tensors(q=q, k=k, v=v, cu_seqlens=cu_seqlens, ridge=ridge)
    _in_graph("lla_attention", return_state, q=q, k=k, v=v, ridge=ridge)
    q, k, v = _autocast(q, k, v)
    options = *_checked_options(scale, causal, window_size), cu_seqlens
    results = _lla_attention(q, k, v, ridge, *system, *options, return_state)
    return _outcome(results, LLAState, return_state)


def lla_probe(q, k, *, ridge, solver="cholesky", scale=None, causal=True, window_size=None, cu_seqlens=None):
    """The probe that makes Parallax attention local linear attention; see :func:`parallax_core.lla_probe`.

    Not differentiable: an input that requires gradients is a TypeError. :func:`lla_attention` solves the same
    probe and is differentiable through it.
    """
    ridge, *system = _checked_ridge(ridge, solver)
    _check_tensors(q=q, k=k, cu_seqlens=cu_seqlens, ridge=ridge)
    _refuse_gradients("lla_probe", "lla_attention is differentiable through its probe", q=q, k=k, ridge=ridge)
    q, k = _autocast(q, k)
    return _lla_probe(q, k, ridge, *system, *_checked_options(scale, causal, window_size), cu_seqlens)


def local_attention(
    q, k, v, *, probe, scale=None, bandwidth=None, kernel="dot", intercept=True, amplification=False,
    ridge=None, solver="cholesky", causal=True, window_size=None, cu_seqlens=None,
):  # fmt: skip
    """Any member of the family of local estimators; see :func:`parallax_core.local_attention`.

    Not differentiable: an input that requires gradients is a TypeError. The members with the dot kernel, an
    intercept and no amplification are :func:`softmax_attention`, :func:`parallax_attention` and
    :func:`lla_attention`, which are.
    """
    named, given = (probe, None) if probe is None or isinstance(probe, str) else (None, probe)
    number = None
    if ridge is not None:
        ridge, number, solver = _checked_ridge(ridge, solver)
    _check_tensors(q=q, k=k, v=v, probe=given, cu_seqlens=cu_seqlens, ridge=ridge)
    if scale is not None or bandwidth is not None:
        scale = problem.checked_bandwidth(scale, bandwidth, 1)
    if not isinstance(kernel, str):
        raise ValueError(f"kernel is {kernel!r}; expected one of {', '.join(map(repr, problem.KERNELS))}")
    for name, value in (("intercept", intercept), ("amplification", amplification)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    _refuse_gradients(
        "local_attention", "softmax_attention, parallax_attention and lla_attention are differentiable",
        q=q, k=k, v=v, probe=given, ridge=ridge,
    )  # fmt: skip
    q, k, v = _autocast(q, k, v)
    return _local_attention(
        q, k, v, None if given is None else _autocast_probe(given), named, kernel, intercept, amplification,
        ridge, number, solver, *_checked_options(scale, causal, window_size), cu_seqlens,
    )  # fmt: skip


def softmax_decode(
    q, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, out=None, return_state=False,
):  # fmt: skip
    """Softmax attention of new tokens against a cache of tensors; see :func:`parallax_core.softmax_decode`.

    Not differentiable: an input that requires gradients is a TypeError, except under ``torch.no_grad()``.
    Under autocast the caches are cast as q is, so keep them in autocast's dtype. Returns ``o``, or
    ``(o, SoftmaxState)``.
    """
    return _decode(
        "softmax_decode", SoftmaxState, {"q": q, "k_cache": k_cache, "v_cache": v_cache}, (),
        cache_seqlens, cache_leftpad, page_table, window_size, scale, out, return_state,
    )  # fmt: skip


def parallax_decode(
    q, r, k_cache, v_cache, *, cache_seqlens=None, cache_leftpad=None, page_table=None, window_size=None,
    scale=None, out=None, return_state=False,
):  # fmt: skip
    """Parallax attention of new tokens against a cache of tensors; see :func:`parallax_core.parallax_decode`.

    Everything else as for :func:`softmax_decode`; the state is a ParallaxState.
    """
    return _decode(
        "parallax_decode", ParallaxState, {"q": q, "r": r, "k_cache": k_cache, "v_cache": v_cache}, (),
        cache_seqlens, cache_leftpad, page_table, window_size, scale, out, return_state,
    )  # fmt: skip


def lla_decode(
    q, k_cache, v_cache, *, ridge, solver="cholesky", cache_seqlens=None, cache_leftpad=None, page_table=None,
    window_size=None, scale=None, out=None, return_state=False,
):  # fmt: skip
    """Local linear attention of new tokens against a cache of tensors; see :func:`parallax_core.lla_decode`.

    Everything else as for :func:`softmax_decode`; the state is an LLAState.
    """
    system = _checked_ridge(ridge, solver)
    return _decode(
        "lla_decode", LLAState, {"q": q, "k_cache": k_cache, "v_cache": v_cache}, system,
        cache_seqlens, cache_leftpad, page_table, window_size, scale, out, return_state,
    )  # fmt: skip


def _decode(
    operation, kind, inputs, system, cache_seqlens, cache_leftpad, page_table, window_size, scale, out,
    return_state,
):  # fmt: skip
    lengths = {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad, "page_table": page_table}
    _check_tensors(**inputs, **lengths, ridge=system[0] if system else None, out=out)
    _refuse_gradients(operation, "", **inputs, ridge=system[0] if system else None, out=out)
    cast = dict(inputs)
    probe = cast.pop("r", None)
    cast = dict(zip(cast, _autocast(*cast.values())))
    if probe is not None:
        cast["r"] = probe = _autocast_probe(probe)
    scale, _, window_size = _checked_options(scale, True, window_size)
    given = *(cast[name] for name in inputs), *system, *lengths.values(), window_size, scale
    new, into = _DECODE[operation]
    if out is None:
        return _outcome(new(*given, return_state), kind, return_state)
    # PyTorch can trace an operator that writes to what it was given only where it returns nothing.
    results = [out, *_empty_results(kind, cast["q"], cast["v_cache"], return_state, probe)[1:]]
    into(*given, out, results[1:])
    return _outcome(results, kind, return_state)


def _mapped_in_turn(operator):
    """Let ``torch.vmap`` call an operator once for each of the mapped."""

    @operator.register_vmap
    def _(info, in_dims, *args):
        def pick(x, dim, i):
            if isinstance(x, (list, tuple)):
                return [pick(*each, i) for each in zip(x, dim)]
            return x if dim is None else x.select(dim, i)

        calls = ([pick(x, dim, i) for x, dim in zip(args, in_dims)] for i in range(info.batch_size))
        stacked = _pytree.tree_map(lambda *x: torch.stack(x), *(operator(*call) for call in calls))
        return stacked, _pytree.tree_map(lambda x: 0, stacked)

    return operator


def _differentiable_once(operator):
    """Have a gradient's operator say so where a second derivative is asked for."""

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f"{operator._name} is differentiated, and has no derivative: gradients of gradients are not "
            "supported; leave create_graph out"
        )

    operator.register_autograd(refuse)
    return operator


def _save_state(ctx, inputs, output):
    """Keep what a gradient needs; where the forward call made no state, the backward call makes its own."""
    *arrays, ctx.scale, ctx.causal, ctx.window_size, cu_seqlens, _ = inputs
    ctx.save_for_backward(*arrays, cu_seqlens, *output)
    ctx.mark_non_differentiable(*output[1:])


@_mapped_in_turn
@torch.library.custom_op(
    "parallax_core::softmax_attention", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_WHOLE}, bool return_state) -> Tensor[]",
)  # fmt: skip
def _softmax_attention(q, k, v, scale, causal, window_size, cu_seqlens, return_state):
    results = plx.softmax_attention(
        *_detached(q, k, v), scale=scale, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
        return_state=return_state,
    )  # fmt: skip
    return _flat(results, return_state)


@_softmax_attention.register_fake
def _(q, k, v, scale, causal, window_size, cu_seqlens, return_state):
    return _empty_results(SoftmaxState, q, v, return_state)


@_mapped_in_turn
@_differentiable_once
@torch.library.custom_op(
    "parallax_core::softmax_attention_backward", mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor[] state, {_WHOLE}) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _softmax_attention_backward(do, q, k, v, o, state, scale, causal, window_size, cu_seqlens):
    return plx.softmax_attention_backward(
        *_detached(do, q, k, v, o), SoftmaxState(*_detached(*state)) if state else None,
        scale=scale, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_softmax_attention_backward.register_fake
def _(do, q, k, v, o, state, scale, causal, window_size, cu_seqlens):
    return _empty_gradients(q, k, v)


def _softmax_gradient(ctx, grads):
    q, k, v, cu_seqlens, o, *state = ctx.saved_tensors
    mask = ctx.scale, ctx.causal, ctx.window_size, cu_seqlens
    gradients = _softmax_attention_backward(grads[0], q, k, v, o, state, *mask)
    return *gradients, None, None, None, None, None


_softmax_attention.register_autograd(_softmax_gradient, setup_context=_save_state)


@_mapped_in_turn
@torch.library.custom_op(
    "parallax_core::parallax_attention", mutates_args=(),
    schema=f"(Tensor q, Tensor r, Tensor k, Tensor v, {_WHOLE}, bool return_state) -> Tensor[]",
)  # fmt: skip
def _parallax_attention(q, r, k, v, scale, causal, window_size, cu_seqlens, return_state):
    results = plx.parallax_attention(
        *_detached(q, r, k, v), scale=scale, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
        return_state=return_state,
    )  # fmt: skip
    return _flat(results, return_state)


@_parallax_attention.register_fake
def _(q, r, k, v, scale, causal, window_size, cu_seqlens, return_state):
    return _empty_results(ParallaxState, q, v, return_state, r)


@_mapped_in_turn
@_differentiable_once
@torch.library.custom_op(
    "parallax_core::parallax_attention_backward", mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor r, Tensor k, Tensor v, Tensor o, Tensor[] state, {_WHOLE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _parallax_attention_backward(do, q, r, k, v, o, state, scale, causal, window_size, cu_seqlens):
    return plx.parallax_attention_backward(
        *_detached(do, q, r, k, v, o), ParallaxState(*_detached(*state)) if state else None,
        scale=scale, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_parallax_attention_backward.register_fake
def _(do, q, r, k, v, o, state, scale, causal, window_size, cu_seqlens):
    return _empty_gradients(q, r, k, v)


def _parallax_gradient(ctx, grads):
    q, r, k, v, cu_seqlens, o, *state = ctx.saved_tensors
    mask = ctx.scale, ctx.causal, ctx.window_size, cu_seqlens
    gradients = _parallax_attention_backward(grads[0], q, r, k, v, o, state, *mask)
    return *gradients, None, None, None, None, None


_parallax_attention.register_autograd(_parallax_gradient, setup_context=_save_state)


@_mapped_in_turn
@torch.library.custom_op(
    "parallax_core::lla_attention", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_RIDGE}, {_WHOLE}, bool return_state) -> Tensor[]",
)  # fmt: skip
def _lla_attention(
    q, k, v, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens, return_state
):
    results = plx.lla_attention(
        *_detached(q, k, v), ridge=_system(ridge, ridge_number), solver=solver, scale=scale, causal=causal,
        window_size=window_size, cu_seqlens=cu_seqlens, return_state=return_state,
    )  # fmt: skip
    return _flat(results, return_state)


@_lla_attention.register_fake
def _(q, k, v, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens, return_state):
    return _empty_results(LLAState, q, v, return_state)


@_mapped_in_turn
@_differentiable_once
@torch.library.custom_op(
    "parallax_core::lla_attention_backward", mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, {_RIDGE}, {_WHOLE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def _lla_attention_backward(
    do, q, k, v, o, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens
):
    return plx.lla_attention_backward(
        *_detached(do, q, k, v, o), None, ridge=_system(ridge, ridge_number), solver=solver, scale=scale,
        causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_lla_attention_backward.register_fake
def _(do, q, k, v, o, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens):
    return *_empty_gradients(q, k, v), q.new_empty(q.shape[:3], dtype=_compute_dtype(q))


def _lla_context(ctx, inputs, output):
    q, k, v, ridge, ctx.ridge_number, ctx.solver, ctx.scale, ctx.causal, ctx.window_size, cu_seqlens, _ = (
        inputs
    )
    ctx.save_for_backward(q, k, v, ridge, cu_seqlens, output[0])
    ctx.mark_non_differentiable(*output[1:])


def _lla_gradient(ctx, grads):
    q, k, v, ridge, cu_seqlens, o = ctx.saved_tensors
    system = ridge, ctx.ridge_number, ctx.solver
    mask = ctx.scale, ctx.causal, ctx.window_size, cu_seqlens
    dq, dk, dv, rows = _lla_attention_backward(grads[0], q, k, v, o, *system, *mask)
    dridge = rows.sum_to_size(ridge.shape).to(ridge.dtype) if ctx.needs_input_grad[3] else None
    return dq, dk, dv, dridge, *(None,) * 7


_lla_attention.register_autograd(_lla_gradient, setup_context=_lla_context)


@_mapped_in_turn
@torch.library.custom_op(
    "parallax_core::lla_probe", mutates_args=(), schema=f"(Tensor q, Tensor k, {_RIDGE}, {_WHOLE}) -> Tensor"
)
def _lla_probe(q, k, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens):
    return plx.lla_probe(
        *_detached(q, k), ridge=_system(ridge, ridge_number), solver=solver, scale=scale, causal=causal,
        window_size=window_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_lla_probe.register_fake
def _(q, k, ridge, ridge_number, solver, scale, causal, window_size, cu_seqlens):
    return q.new_empty(q.shape, dtype=_compute_dtype(q))


@_mapped_in_turn
@torch.library.custom_op(
    "parallax_core::local_attention", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? probe, str? named_probe, str kernel, bool intercept, "
    f"bool amplification, {_RIDGE}, {_WHOLE}) -> Tensor",
)  # fmt: skip
def _local_attention(
    q, k, v, probe, named_probe, kernel, intercept, amplification, ridge, ridge_number, solver, scale, causal,
    window_size, cu_seqlens,
):  # fmt: skip
    return plx.local_attention(
        *_detached(q, k, v), probe=named_probe if probe is None else probe.detach(), scale=scale,
        kernel=kernel, intercept=intercept, amplification=amplification, ridge=_system(ridge, ridge_number),
        solver=solver, causal=causal, window_size=window_size, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@_local_attention.register_fake
def _(
    q, k, v, probe, named_probe, kernel, intercept, amplification, ridge, ridge_number, solver, scale, causal,
    window_size, cu_seqlens,
):  # fmt: skip
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _define_decode(operation: str, kind, inputs: str):
    """The operator of a decode, which returns its output and state, and the one that writes into ``out``."""
    names = [argument.split()[-1] for argument in inputs.split(", ")]

    def call(tensors, lengths, window_size, scale, out, return_state):
        given = dict(zip(names, tensors))
        options = {}
        if "solver" in given:
            options = {
                "ridge": _system(given.pop("ridge"), given.pop("ridge_number")),
                "solver": given.pop("solver"),
            }
        cache_seqlens, cache_leftpad, page_table = lengths
        return getattr(plx, operation)(
            *_detached(*given.values()), **options, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad,
            page_table=page_table, window_size=window_size, scale=scale, out=out, return_state=return_state,
        )  # fmt: skip

    n = len(names)
    v = names.index("v_cache")
    r = names.index("r") if "r" in names else None

    @_mapped_in_turn
    @torch.library.custom_op(
        f"parallax_core::{operation}", mutates_args=(),
        schema=f"({inputs}, {_CACHE}, bool return_state) -> Tensor[]",
    )  # fmt: skip
    def new(*args):
        *given, window_size, scale, return_state = args
        return _flat(call(given[:n], given[n:], window_size, scale, None, return_state), return_state)

    @new.register_fake
    def _(*args):
        return _empty_results(kind, args[0], args[v], args[-1], None if r is None else args[r])

    @torch.library.custom_op(
        f"parallax_core::{operation}_into", mutates_args=("out", "state"),
        schema=f"({inputs}, {_CACHE}, Tensor(a!) out, Tensor(b!)[] state) -> ()",
    )  # fmt: skip
    def into(*args):
        *given, window_size, scale, out, state = args
        results = call(given[:n], given[n:], window_size, scale, out.detach(), bool(state))
        for to, x in zip(state, _flat(results, bool(state))[1:]):
            to.copy_(x)

    @into.register_fake
    def _(*args):
        return None

    return new, into


_DECODE = {
    "softmax_decode": _define_decode(
        "softmax_decode", SoftmaxState, "Tensor q, Tensor k_cache, Tensor v_cache"
    ),
    "parallax_decode": _define_decode(
        "parallax_decode", ParallaxState, "Tensor q, Tensor r, Tensor k_cache, Tensor v_cache"
    ),
    "lla_decode": _define_decode(
        "lla_decode", LLAState, f"Tensor q, Tensor k_cache, Tensor v_cache, {_RIDGE}"
    ),
}


def _check_tensors(**given) -> None:
    optional = "probe", "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table", "ridge", "out"
    for name, x in given.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
        # One tensor on the meta device would have PyTorch hand back memory that nothing was written to.
        if x.device != given["q"].device:
            raise TypeError(f"{name} is on {x.device}; expected {given['q'].device}, where q is")
        # Operators in Python drop it, as if the derivative were 0.
        if forward_ad.unpack_dual(x).tangent is not None:
            raise TypeError(
                f"{name} has a tangent of forward-mode differentiation, which is not supported; "
                "use reverse mode, as loss.backward() does"
            )
        # Tracing works out the results' shapes from these axes, before any operator has checked them.
        if x.ndim != 4 and name not in optional:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected 4 axes, (batch, length, heads, head size)"
            )


def _checked_options(scale, causal, window_size):
    """The options as the operators' schemas take them; PyTorch's own message would not name them."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if scale is not None:
        scale = problem._checked_scale(scale, 1)
    return scale, causal, problem._checked_window(window_size, causal)


def _checked_ridge(ridge, solver):
    if solver not in problem.SOLVERS:
        raise ValueError(f"solver is {solver!r}; expected one of {', '.join(map(repr, problem.SOLVERS))}")
    if isinstance(ridge, torch.Tensor):
        return ridge, None, solver
    if isinstance(ridge, bool) or not isinstance(ridge, numbers.Real):
        raise TypeError(f"ridge must be a number or a tensor, got {ridge!r}")
    return None, float(ridge), solver


def _requiring(**given) -> str | None:
    """The first tensor by which a gradient will be asked for."""
    if torch.is_grad_enabled():
        for name, x in given.items():
            if x is not None and x.requires_grad:
                return name
    return None


def _in_graph(operation: str, return_state: bool, **given) -> bool:
    name = _requiring(**given)
    if name is not None and return_state:
        raise TypeError(
            f"{name} requires gradients, which {operation} does not have for its state; "
            "leave return_state out, detach the inputs, or call it under torch.no_grad()"
        )
    return name is not None


def _refuse_gradients(operation: str, instead: str, **given) -> None:
    name = _requiring(**given)
    if name is not None:
        raise TypeError(
            f"{name} requires gradients, which {operation} does not have; "
            f"{instead + '; otherwise ' if instead else ''}detach it, or call it under torch.no_grad()"
        )


def _autocast(*tensors):
    """The tensors in autocast's dtype where it is on; float64 stays, as in PyTorch's own operators."""
    where = tensors[0].device.type
    if not torch.amp.is_autocast_available(where) or not torch.is_autocast_enabled(where):
        return tensors
    dtype = torch.get_autocast_dtype(where)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _autocast_probe(r):
    return r if r.dtype == torch.float32 else _autocast(r)[0]


def _detached(*tensors):
    # Under torch.no_grad() a parameter still says that it requires gradients.
    return tuple(x.detach() for x in tensors)


def _system(ridge, ridge_number):
    return ridge_number if ridge is None else ridge.detach()


def _flat(results, return_state: bool) -> list:
    if not return_state:
        return [results]
    o, state = results
    if isinstance(state, LLAState):
        # The queries and the ridge may be the call's own, which no operator may return.
        state = state._replace(q=state.q.clone(), ridge=state.ridge.clone())
    return [o, *state]


def _outcome(results, kind, return_state: bool):
    return (results[0], kind(*results[1:])) if return_state else results[0]


def _compute_dtype(*tensors):
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _empty_results(kind, q, v, return_state: bool, r=None) -> list:
    rows, value_dim = q.shape[:3], v.shape[3]
    o = q.new_empty((*rows, value_dim))
    if not return_state:
        return [o]
    dtype = _compute_dtype(q) if r is None else _compute_dtype(q, r)
    return [o, *(q.new_empty(s, dtype=dtype) for s in state_shapes(kind, rows, q.shape[3], value_dim))]


def _empty_gradients(*inputs) -> tuple:
    return tuple(x.new_empty(x.shape) for x in inputs)
