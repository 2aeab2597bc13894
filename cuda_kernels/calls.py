"""A call of an operation on GPU arrays: looked up by its signature, or checked and planned once.

docs/gpu.md says what a call costs whose signature was seen before. Everything that a plan depends on is in
the signature: shapes, strides, dtypes, device, alignment and options, never addresses.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, NamedTuple

import numpy as np
from cupy.cuda import runtime

from parallax_core import exchange, gpu_exchange, problem
from parallax_core.errors import BackendUnavailableError
from parallax_core.gpu_exchange import ALIGNMENT, Description, Framework, Matcher
from parallax_core.problem import GPU_DTYPES, Problem
from parallax_core.state import LLAState, ParallaxState, SoftmaxState

from . import device as devices
from .layout import Layout

MOST_CALLS = 1024
"""Prepared calls that are kept; each is a few kilobytes."""
MOST_RECENT = 4
"""Calls of the same options, on arrays of different shapes, that are tried before a signature is built."""
MAX_HEAD_DIM = 256

_FLOAT32 = np.dtype(np.float32)


class Arrays(NamedTuple):
    """The arrays of any operation, None where there is none. k, v: the caches of a decode operation."""

    q: Any
    r: Any
    k: Any
    v: Any
    cu_seqlens: Any
    cache_seqlens: Any
    cache_leftpad: Any
    page_table: Any
    out: Any
    ridge: Any


class Options(NamedTuple):
    """Everything else. ridge, solver: of the LLA operations; ridge is None where it is an array."""

    scale: Any
    causal: Any
    window_size: Any
    split_size: Any
    ridge: Any
    solver: Any


_INDEX = "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table"
_DENSE = "q", "r", "k", "v", "out"
_OUT = Arrays._fields.index("out")

_lock = threading.Lock()
# By options and signature; and by options alone the latest, each with a function that knows its arrays.
_calls: dict[tuple, Call] = {}
_recent: dict[tuple, tuple[tuple[Call, Matcher], ...]] = {}
_clock = itertools.count()


def attend(operation: str, arrays: tuple, options: tuple, return_state: bool, validate: bool):
    """Run an operation on GPU arrays; returns ``o`` or ``(o, state)`` in the framework of ``q``.

    operation: a public name. arrays, options: as :class:`Arrays` and :class:`Options` have them, whole; plain
    tuples will do, and cost a known call less. validate: check the values of index arrays and of a ridge,
    which waits for the device. Raises as the public operation does.
    """
    return_state = bool(return_state)
    # Equal numbers of two types, 1 and True, are one key; the types tell them apart, and say what is there.
    key = operation, return_state, options, (*map(type, options), *map(type, arrays))
    try:
        recent = _recent.get(key, ())
    except TypeError:  # an option that is no number has no hash
        recent = ()
    pointers = None
    for call, pointers_of in recent:  # noqa: B007
        pointers = pointers_of(arrays)
        if pointers is not None:
            break
    if pointers is None:
        arrays, options = Arrays._make(arrays), Options._make(options)
        framework = gpu_exchange.framework(arrays.q)
        found = None if framework is None else framework.signature(arrays)
        if found is None:
            return _attend_foreign(operation, arrays, options, return_state, validate)
        pointers, signature = found
        call = _call(key, signature, framework, arrays, options)
    call.last_used = next(_clock)
    if validate:
        _check_values(operation, call.framework, Arrays._make(arrays), Options._make(options))
    return call(arrays, pointers)


def forget() -> None:
    """Drop every prepared call."""
    with _lock:
        _calls.clear()
        _recent.clear()


def _call(key: tuple, signature: list, framework: Framework, arrays: Arrays, options: Options) -> Call:
    """The prepared call of a signature; ``key`` finds it faster from now on."""
    operation, return_state, *_ = key
    whole = (*key, *signature)
    try:
        call = _calls[whole]
    except (KeyError, TypeError):
        call = _prepare(operation, framework, arrays, options, return_state)
        _remember(whole, call)
    matcher = framework.matcher(arrays)
    if matcher is not None:
        _recent[key] = ((call, matcher), *_recent.get(key, ()))[:MOST_RECENT]
    return call


class Call:
    """A checked and planned call, for any arrays of one signature."""

    __slots__ = (
        "_allocate", "_allocate_state", "_copies", "_device", "_extents", "_kind", "_no_state", "_operation",
        "_options", "_out_shape", "_plan", "framework", "last_used",
    )  # fmt: skip

    def __init__(self, operation, framework, arrays, options, described, problem_, layout, ridge, copies):
        self._operation, self.framework, self._options = operation, framework, options
        self._device, self._copies = layout.device, copies
        self._out_shape = problem_.output_shape
        probe = _FLOAT32 if operation == "lla_probe" else None
        self._allocate = framework.allocator(arrays.q, problem_.output_shape, probe)
        self._extents = {name: _extent(described[name]) for name in described}
        solved = operation.startswith("lla")
        self._kind = LLAState if solved else SoftmaxState if arrays.r is None else ParallaxState
        self._no_state = (0,) * len((LLAState if solved else ParallaxState)._fields)
        self._allocate_state = None
        if layout.return_state:
            self._allocate_state = [
                framework.allocator(arrays.q, shape, _FLOAT32)
                for shape in _state_shapes(self._kind, problem_)
            ]
        empty = 0 in problem_.output_shape or problem_.kv_len == 0
        self._plan = None if empty or copies else _plan(operation, problem_, layout, options, ridge)

    def __call__(self, arrays: tuple, pointers: list[int]):
        if arrays[_OUT] is not None:
            self._check_overlap(pointers)
        previous = runtime.getDevice()
        # Also where it is the current one: a thread of its own may have no context yet.
        runtime.setDevice(self._device)
        try:
            if self._copies:
                return self._run_copied(Arrays._make(arrays))
            return self._run(arrays, pointers)
        except MemoryError as error:
            raise self._out_of_memory(error) from error
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
                raise self._out_of_memory(error) from error
            raise
        finally:
            if previous != self._device:
                runtime.setDevice(previous)

    def _run(self, arrays: tuple, pointers: list[int]):
        framework, q, out = self.framework, arrays[0], arrays[_OUT]
        if out is None:
            out = self._allocate(q)
            pointers[_OUT] = framework.address(out)
        state, sums = None, self._no_state
        if self._allocate_state is not None:
            state = self._kind(*[allocate(q) for allocate in self._allocate_state])
            sums = (*map(framework.address, state),)
            if self._kind is SoftmaxState:
                sums = sums[0], sums[1], 0, sums[2], 0, 0
        if self._plan is None:
            self._fill_empty(Arrays._make(arrays), out, state)
        else:
            self._plan.launch(framework.current_stream(self._device), pointers, sums)
        return out if state is None else (out, state)

    def _fill_empty(self, arrays: Arrays, out, state) -> None:
        """Rows that see no key: the output 0, and the state that merges as nothing."""
        fill, assign = self.framework.fill, self.framework.assign
        fill(out, 0)
        for name, x in () if state is None else zip(state._fields, state):
            fill(x, -np.inf if name == "m" else 0)
        if self._kind is LLAState and state is not None:
            assign(state.q, arrays.q)
            if arrays.ridge is None:
                fill(state.ridge, self._options.ridge)
            else:
                assign(state.ridge, arrays.ridge)

    def _run_copied(self, arrays: Arrays):
        """The same call on copies of what no kernel reads as it lies: strided last axes, narrow ridges."""
        out = arrays.out
        dense = {
            name: self.framework.contiguous(getattr(arrays, name)) for name in self._copies - {"out", "ridge"}
        }
        if "out" in self._copies:
            dense["out"] = None
        if "ridge" in self._copies:
            shape = tuple(arrays.ridge.shape)
            dense["ridge"] = self.framework.allocator(arrays.q, shape, _FLOAT32)(arrays.q)
            self.framework.assign(dense["ridge"], arrays.ridge)
        options, state = self._options, self._allocate_state is not None
        result = attend(self._operation, arrays._replace(**dense), options, state, False)
        if "out" not in self._copies:
            return result
        self.framework.assign(out, result[0] if state else result)
        return (out, *result[1:]) if state else out

    def _check_overlap(self, pointers: list[int]) -> None:
        first, last = self._extents["out"]
        begin, end = pointers[_OUT] + first, pointers[_OUT] + last
        for name, (first, last) in self._extents.items():
            pointer = pointers[Arrays._fields.index(name)]
            if name != "out" and pointer + first < end and begin < pointer + last:
                public = _public_name(self._operation, name)
                raise ValueError(f"out overlaps {public} in memory; inputs are never written to")

    def _out_of_memory(self, error: Exception) -> MemoryError:
        what = f"an output of shape {self._out_shape}"
        if self._allocate_state is not None:
            what += f" and a {self._kind.__name__}"
        return MemoryError(
            f"CUDA device {self._device} has too little memory left for {self._operation}: {what}, "
            f"and its workspace ({str(error).strip().splitlines()[0]})"
        )


def _remember(key: tuple, call: Call) -> None:
    """Keep a call; where there are too many, the half that was not used lately goes."""
    with _lock:
        if len(_calls) >= MOST_CALLS:
            _recent.clear()
            for old in sorted(_calls, key=lambda k: _calls[k].last_used)[: MOST_CALLS // 2]:
                del _calls[old]
        call.last_used = next(_clock)
        _calls[key] = call


def _prepare(operation: str, framework: Framework, arrays: Arrays, options: Options, return_state) -> Call:
    """Check a call whose arrays are all ``framework``'s own, and plan it."""
    names = {name: _public_name(operation, name) for name in Arrays._fields}
    device = _common_device({names[n]: x for n, x in zip(Arrays._fields, arrays) if x is not None})
    found = devices.properties(device)
    if found.capability < devices.MINIMUM_CAPABILITY:
        version = ".".join(map(str, found.capability))
        raise BackendUnavailableError(
            f"q is on CUDA device {device} of compute capability {version}; at least 8.0 is needed"
        )
    described = {n: framework.describe(names[n], x) for n, x in zip(Arrays._fields, arrays) if x is not None}
    problem_ = _describe(operation, described, options)
    if "out" in described:
        problem.check_out(problem_, described["out"])
    ridge = described.get("ridge")
    if operation.startswith("lla"):
        _check_ridge(ridge, options, problem_)
        ridge = float(options.ridge) if ridge is None else _broadcast_strides(ridge)
    copies = {n for n in _DENSE if n in described and not _dense_last_axis(described[n])}
    copies |= {n for n in _INDEX if n in described and not _contiguous(described[n])}
    copies |= {n for n in ("ridge",) if n in described and described[n].dtype != _FLOAT32}
    pointers = {n: framework.address(getattr(arrays, n)) for n in _DENSE if n in described}
    strides = {n: _strides(described[n]) if n in described else None for n in _DENSE}
    if strides["out"] is None:
        _, length, heads, size = shape = problem_.output_shape
        dense = length * heads * size, heads * size, size, 1
        strides["out"] = _strides(Description(shape, dense, problem_.dtype))

    def is_aligned(name: str) -> bool:
        size = described[name].dtype.itemsize
        return not any(n % ALIGNMENT for n in (pointers[name], *(s * size for s in strides[name])))

    layout = Layout(
        device=device, capability=found.capability, multiprocessors=found.multiprocessors,
        cache_bytes=found.cache_bytes, shared_bytes=found.shared_bytes, **strides,
        aligned=all(is_aligned(n) for n in ("k", "v") if n in described),
        aligned_queries=all(is_aligned(n) for n in ("q", "r") if n in described),
        index_bits={n: 8 * described[n].dtype.itemsize for n in _INDEX if n in described},
        return_state=return_state, split_size=problem.checked_split_size(options.split_size),
        num_pages=described["k"].shape[0] if "page_table" in described else None,
    )  # fmt: skip
    return Call(operation, framework, arrays, options, described, problem_, layout, ridge, frozenset(copies))


def _plan(operation: str, problem_: Problem, layout: Layout, options: Options, ridge):
    if operation.startswith("lla"):
        from . import lla

        return lla.plan(problem_, layout, ridge, options.solver)
    from . import attend

    return attend.plan(problem_, layout)


def _describe(operation: str, described: dict[str, Any], options: Options) -> Problem:
    get = described.get
    common = dict(
        scale=options.scale, window_size=options.window_size, max_head_dim=MAX_HEAD_DIM, dtypes=GPU_DTYPES
    )
    if operation.endswith("_decode"):
        return problem.describe_decode(
            operation, described["q"], described["k"], described["v"], get("r"), **common,
            cache_seqlens=get("cache_seqlens"), cache_leftpad=get("cache_leftpad"),
            page_table=get("page_table"),
        )  # fmt: skip
    return problem.describe_attention(
        operation, described["q"], described["k"], get("v"), get("r"), **common,
        causal=options.causal, cu_seqlens=get("cu_seqlens"),
    )  # fmt: skip


def _check_values(operation: str, framework: Framework, arrays: Arrays, options: Options) -> None:
    """The checks of a call on the CPU, with index arrays and a ridge read back from the device."""
    described = {}
    for name, x in zip(Arrays._fields, arrays):
        if x is not None:
            described[name] = framework.read_back(x) if name in _INDEX else framework.describe(name, x)
    problem_ = _describe(operation, described, options)
    if arrays.ridge is not None:
        problem.checked_ridge(framework.read_back(arrays.ridge), problem_.row_shape, options.solver)


def _check_ridge(ridge: Description | None, options: Options, problem_: Problem) -> None:
    if ridge is None:
        problem.checked_ridge(options.ridge, problem_.row_shape, options.solver)
        return
    if ridge.dtype not in GPU_DTYPES:
        allowed = ", ".join(t.name for t in GPU_DTYPES)
        raise TypeError(f"ridge has dtype {ridge.dtype}; expected one of {allowed} on a GPU")
    # Its values are on the device: numbers in their place check the shape and the solver.
    problem.checked_ridge(np.ones(ridge.shape), problem_.row_shape, options.solver)


def _attend_foreign(operation: str, arrays: Arrays, options: Options, return_state, validate):
    """A call with arrays of frameworks that only an exchange protocol opens, or of several ones."""
    names = [_public_name(operation, name) for name in Arrays._fields]
    present = {name: x for name, x in zip(names, arrays) if x is not None}
    device = _common_device(present)
    stream = gpu_exchange.current_stream(arrays.q, device)
    with gpu_exchange.on(device, stream, arrays):
        views = Arrays(
            *(
                None if x is None else gpu_exchange.as_cupy(name, x, device, stream)
                for name, x in zip(names, arrays)
            )
        )
        result = attend(operation, views, options, return_state, validate)
        gpu_exchange.hold(views, stream)
        o, state = result if return_state else (result, None)
        o = gpu_exchange.hand_back(o, arrays.q) if arrays.out is None else arrays.out
        if state is None:
            return o
        return o, type(state)(*(gpu_exchange.hand_back(x, arrays.q) for x in state))


def _common_device(present: dict[str, Any]) -> int:
    """The index of the device that all arrays are on; TypeError where one cannot be exchanged or differs."""
    where = {name: exchange.device(name, x) for name, x in present.items()}
    for name, place in where.items():
        # Managed memory counts as memory of the device that it is exported for.
        if place[0] not in (exchange.CUDA, exchange.CUDA_MANAGED) or place[1] != where["q"][1]:
            raise TypeError(
                f"{name} is on {exchange.device_name(place)}; "
                f"expected {exchange.device_name(where['q'])}, where q is"
            )
    return where["q"][1]


def _state_shapes(kind: type, problem_: Problem) -> list[tuple[int, ...]]:
    rows, D, Dv = problem_.row_shape, problem_.head_dim, problem_.value_dim
    tails = dict(O1=(Dv,), O2=(Dv,), k0=(D,), wk=(D,), wv=(Dv,), wkk=(D, D), wvk=(Dv, D), q=(D,))
    return [(*rows, *tails.get(field, ())) for field in kind._fields]


def _public_name(operation: str, name: str) -> str:
    return f"{name}_cache" if name in ("k", "v") and operation.endswith("_decode") else name


def _strides(x: Description) -> tuple[int, ...]:
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[:3], x.strides))


def _broadcast_strides(ridge: Description) -> tuple[int, ...]:
    """Strides of a ridge along ``(B, Lq, Hq)``, 0 where it is one for all."""
    missing = 3 - ridge.ndim
    return (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(ridge.shape, ridge.strides))


def _dense_last_axis(x: Description) -> bool:
    return x.shape[-1] <= 1 or x.strides[-1] == 1 or 0 in x.shape


def _contiguous(x: Description) -> bool:
    if 0 in x.shape:
        return True
    expected = 1
    for n, s in zip(reversed(x.shape), reversed(x.strides)):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


def _extent(x: Description) -> tuple[int, int]:
    """First byte of an array and the one after its last, from its address on."""
    if 0 in x.shape:
        return 0, 0
    reach = [(n - 1) * s for n, s in zip(x.shape, x.strides)]
    low, high = sum(s for s in reach if s < 0), sum(s for s in reach if s > 0) + 1
    return low * x.dtype.itemsize, high * x.dtype.itemsize
