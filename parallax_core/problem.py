"""One validated description of a call, made once and used by every backend.

Nothing here touches the values of q, k or v: shapes and dtypes are enough, so that arrays on any device
are described alike. Index arrays (lengths, pages) are checked by value where they can be read.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
GPU_DTYPES = DTYPES[1:]
SOLVERS = ("cholesky", "cg", "lstsq")
KERNELS = ("dot", "gaussian")


class Sequence(NamedTuple):
    """Rows of one sequence and the keys they may see.

    Row ``q_begin + i`` of batch ``batch`` sees the positions ``first .. last`` of the keys, where ``last`` is
    ``end - 1`` without a causal mask and ``end - (q_end - q_begin) + i`` with one; a window then keeps the
    last ``window_size`` of them. Positions are rows of batch ``batch`` of k and v, or of page table row
    ``batch``.
    """

    batch: int
    q_begin: int
    q_end: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What a call computes, with every shape, dtype and option checked.

    ``batch, q_len, kv_len, q_heads, kv_heads, head_dim, value_dim`` are the sizes of ``q (B, Lq, Hq, D)``,
    ``k (B, Lk, Hkv, D)`` and ``v (B, Lk, Hkv, Dv)``; with pages ``kv_len`` is the capacity of a page table
    row. The index arrays are int64 NumPy arrays or None; where they lie on a GPU, what has their shape and
    dtype alone.
    """

    operation: str
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype
    probe_dtype: np.dtype | None
    scale: float
    causal: bool
    window_size: int | None = None
    cu_seqlens: np.ndarray | None = None
    cache_seqlens: np.ndarray | None = None
    cache_leftpad: np.ndarray | None = None
    page_table: np.ndarray | None = None
    page_size: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share a key head."""
        return self.q_heads // self.kv_heads if self.kv_heads else 0

    @property
    def compute_dtype(self) -> np.dtype:
        """float64 where an input is float64, float32 otherwise; that of states and solved probes too."""
        probe_dtype = self.dtype if self.probe_dtype is None else self.probe_dtype
        return DTYPES[0] if DTYPES[0] in (self.dtype, probe_dtype) else DTYPES[1]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.q_len, self.q_heads, self.value_dim

    @property
    def row_shape(self) -> tuple[int, int, int]:
        return self.batch, self.q_len, self.q_heads

    def sequences(self) -> Iterator[Sequence]:
        """The sequences of the call, in the order of their rows."""
        if self.cu_seqlens is not None:
            for begin, end in zip(self.cu_seqlens[:-1].tolist(), self.cu_seqlens[1:].tolist()):
                yield Sequence(0, begin, end, begin, end)
            return
        for b in range(self.batch):
            first = 0 if self.cache_leftpad is None else int(self.cache_leftpad[b])
            end = self.kv_len if self.cache_seqlens is None else int(self.cache_seqlens[b])
            yield Sequence(b, 0, self.q_len, first, end)


def describe_attention(
    operation: str,
    q,
    k,
    v,
    r=None,
    *,
    scale=None,
    causal=True,
    window_size=None,
    cu_seqlens: np.ndarray | None = None,
    max_head_dim: int | None = None,
    dtypes: tuple[np.dtype, ...] = DTYPES,
) -> Problem:
    """Check a call on whole sequences and describe it.

    q, k, v, r: anything with ``shape`` and a NumPy ``dtype``; ``cu_seqlens``: a NumPy array, whose values are
    checked, anything with ``shape`` and ``dtype``, whose values are not, or None. ``v`` is None where a call
    has no values (the probe's). dtypes: those that the backend takes. Raises ValueError for shapes, ranges
    and lengths, TypeError for dtypes.
    """
    batch, q_len, q_heads, head_dim = _dims("q", q)
    kv_batch, kv_len, kv_heads, value_dim = _keys_and_values(q, k, v)
    if kv_batch != batch:
        raise ValueError(f"k has batch size {kv_batch} (shape {_shape(k)}); expected {batch}, that of q")
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    _check_dtypes(q, k, v, r, dtypes)
    _check_probe_shape(q, r)
    _check_heads(q_heads, kv_heads, head_dim, value_dim, max_head_dim)
    window_size = _checked_window(window_size, bool(causal))
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs sequences into a batch of 1, but q has batch size {batch}")
        if kv_len != q_len:
            raise ValueError(
                f"cu_seqlens packs queries and keys alike, but q has length {q_len} and k has {kv_len}"
            )
        cu_seqlens = _checked_cu_seqlens(cu_seqlens, q_len)
    return Problem(
        operation=operation,
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=np.dtype(q.dtype),
        probe_dtype=None if r is None else np.dtype(r.dtype),
        scale=_checked_scale(scale, head_dim),
        causal=bool(causal),
        window_size=window_size,
        cu_seqlens=cu_seqlens,
    )


def describe_decode(
    operation: str,
    q,
    k_cache,
    v_cache,
    r=None,
    *,
    scale=None,
    window_size=None,
    cache_seqlens: np.ndarray | None = None,
    cache_leftpad: np.ndarray | None = None,
    page_table: np.ndarray | None = None,
    max_head_dim: int | None = None,
    dtypes: tuple[np.dtype, ...] = DTYPES,
) -> Problem:
    """Check a call on a key-value cache and describe it; always causal.

    The caches are ``(B, capacity, Hkv, D)``, or ``(num_pages, page_size, Hkv, D)`` with a page table.
    Index arrays, ``dtypes`` and what is raised as for :func:`describe_attention`.
    """
    batch, q_len, q_heads, head_dim = _dims("q", q)
    outer, inner, kv_heads, value_dim = _keys_and_values(q, k_cache, v_cache, suffix="_cache")
    _check_dtypes(q, k_cache, v_cache, r, dtypes, suffix="_cache")
    _check_probe_shape(q, r)
    _check_heads(q_heads, kv_heads, head_dim, value_dim, max_head_dim, suffix="_cache")
    page_size = None
    if page_table is None:
        if outer != batch:
            raise ValueError(
                f"k_cache has batch size {outer} (shape {_shape(k_cache)}); expected {batch}, that of q"
            )
        capacity = inner
    else:
        page_table = _checked_index("page_table", page_table, (batch, None))
        page_size = inner
        if page_size == 0:
            raise ValueError(f"k_cache has pages of size 0 (shape {_shape(k_cache)}); expected at least 1")
        capacity = page_table.shape[1] * page_size
        if cache_seqlens is None:
            raise ValueError("page_table needs cache_seqlens: the valid length of each sequence")
    if cache_seqlens is not None:
        cache_seqlens = _checked_index("cache_seqlens", cache_seqlens, (batch,))
        _check_range("cache_seqlens", cache_seqlens, 0, capacity, "the capacity of the cache")
    if cache_leftpad is not None:
        cache_leftpad = _checked_index("cache_leftpad", cache_leftpad, (batch,))
        lengths = cache_seqlens if cache_seqlens is not None else np.full(batch, capacity, np.int64)
        if _readable(cache_leftpad, lengths):
            bad = np.flatnonzero((cache_leftpad < 0) | (cache_leftpad > lengths))
            if bad.size:
                b = int(bad[0])
                raise ValueError(
                    f"cache_leftpad[{b}] is {int(cache_leftpad[b])}; expected 0 to {int(lengths[b])}, "
                    "the length of that sequence"
                )
    if _readable(page_table, cache_seqlens, 0 if cache_leftpad is None else cache_leftpad):
        _check_pages(page_table, page_size, outer, cache_seqlens, cache_leftpad)
    return Problem(
        operation=operation,
        batch=batch,
        q_len=q_len,
        kv_len=capacity,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=np.dtype(q.dtype),
        probe_dtype=None if r is None else np.dtype(r.dtype),
        scale=_checked_scale(scale, head_dim),
        causal=True,
        window_size=_checked_window(window_size, True),
        cache_seqlens=cache_seqlens,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        page_size=page_size,
    )


def check_gradient(problem: Problem, do, o, state, kind: type, *, float64: bool = False) -> None:
    """Check what a backward call takes beside the inputs of its forward call.

    do, o: the gradient of the output and the output, of shape ``(B, Lq, Hq, Dv)`` and the dtype of q, or also
    float64 where ``float64`` is True (the reference returns float64 for every dtype). state: the forward
    call's, a ``kind`` of :mod:`parallax_core.state` in the compute dtype or float64, or None. All have
    ``shape`` and a NumPy ``dtype``; no value is read. Raises ValueError for shapes, TypeError for dtypes and
    for a state of another kind.
    """
    dtypes = dict.fromkeys((problem.dtype, DTYPES[0]) if float64 else (problem.dtype,))
    for name, x in (("do", do), ("o", o)):
        if _shape(x) != problem.output_shape:
            raise ValueError(
                f"{name} has shape {_shape(x)}; expected {problem.output_shape}, that of the output"
            )
        if np.dtype(x.dtype) not in dtypes:
            allowed = " or ".join(t.name for t in dtypes)
            raise TypeError(f"{name} has dtype {np.dtype(x.dtype)}; expected {allowed}")
    if state is None:
        return
    if not isinstance(state, kind):
        raise TypeError(
            f"state is a {type(state).__name__}; expected the {kind.__name__} of the forward call, or None"
        )
    rows, D, Dv = problem.row_shape, problem.head_dim, problem.value_dim
    tails = dict(O1=(Dv,), O2=(Dv,), k0=(D,), wk=(D,), wv=(Dv,), wkk=(D, D), wvk=(Dv, D), q=(D,))
    dtypes = dict.fromkeys((problem.compute_dtype, DTYPES[0]))
    for field, x in zip(state._fields, state):
        expected = (*rows, *tails.get(field, ()))
        if _shape(x) != expected:
            raise ValueError(
                f"state.{field} has shape {_shape(x)}; expected {expected}: the state is of another problem"
            )
        if np.dtype(x.dtype) not in dtypes:
            allowed = " or ".join(t.name for t in dtypes)
            raise TypeError(f"state.{field} has dtype {np.dtype(x.dtype)}; expected {allowed}")


def check_out(problem: Problem, out) -> None:
    """Check the shape and dtype of an array to write the output to."""
    if _shape(out) != problem.output_shape:
        raise ValueError(f"out has shape {_shape(out)}; expected {problem.output_shape}")
    if np.dtype(out.dtype) != problem.dtype:
        raise TypeError(f"out has dtype {np.dtype(out.dtype)}; expected {problem.dtype}, that of q")


def checked_split_size(split_size) -> int | None:
    """Keys a split of a cache: None, or a positive multiple of 16."""
    if split_size is None:
        return None
    if not isinstance(split_size, numbers.Integral) or isinstance(split_size, (bool, np.bool_)):
        raise TypeError(f"split_size must be an integer or None, got {split_size!r}")
    if split_size < 1 or split_size % 16:
        raise ValueError(f"split_size is {split_size}; expected a positive multiple of 16")
    return int(split_size)


def checked_ridge(ridge, row_shape: tuple[int, int, int], solver: str) -> np.ndarray:
    """The ridge as a float64 array that broadcasts to ``(B, Lq, Hq)``.

    Raises ValueError where it is negative, not finite, of another shape, or 0 with a solver that needs a
    positive definite matrix; TypeError where it is no number.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; expected one of {', '.join(map(repr, SOLVERS))}")
    if ridge is None or isinstance(ridge, (bool, np.bool_, str)):
        raise TypeError(f"ridge must be a number or an array of numbers, got {ridge!r}")
    try:
        given = np.asarray(ridge)
        # NumPy would drop an imaginary part, and make a ridge of 1 of True.
        lam = None if given.dtype.kind in "bc" else given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"ridge must be a number or an array of numbers, got {type(ridge).__name__}"
        ) from error
    if lam is None:
        raise TypeError(f"ridge has dtype {given.dtype}; expected real numbers")
    try:
        fits = np.broadcast_shapes(lam.shape, row_shape) == tuple(row_shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"ridge has shape {lam.shape}; expected one that broadcasts to (B, Lq, Hq) = {row_shape}"
        )
    if not np.isfinite(lam).all() or (lam < 0).any():
        worst = lam[~np.isfinite(lam) | (lam < 0)].flat[0]
        raise ValueError(f"ridge is {worst}; expected finite values of 0 or more")
    if solver != "lstsq" and (lam == 0).any():
        raise ValueError(f"ridge is 0 with solver={solver!r}; a ridge of 0 needs solver='lstsq'")
    return lam


def checked_bandwidth(scale, bandwidth, head_dim: int) -> float:
    """The scale of a call that takes a scale or a bandwidth h, ``scale = 1 / h**2``."""
    if bandwidth is None:
        return _checked_scale(scale, head_dim)
    if scale is not None:
        raise ValueError(
            f"scale is {scale!r} and bandwidth is {bandwidth!r}; give one of them, scale = 1/bandwidth**2"
        )
    if not _is_real(bandwidth):
        raise TypeError(f"bandwidth must be a number, got {bandwidth!r}")
    # Of a bandwidth below 1e-154 the scale 1/h**2 is infinite, and no scale.
    inverse = 1.0 / float(bandwidth) if bandwidth > 0 else math.nan
    if not inverse * inverse < math.inf:
        raise ValueError(f"bandwidth is {bandwidth!r}; expected a positive number of at least 1e-154")
    return inverse * inverse


def check_family(probe, kernel, intercept, amplification, ridge, scale: float) -> None:
    """Check that the options of ``local_attention`` name a member of the family; ValueError or TypeError."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; expected one of {', '.join(map(repr, KERNELS))}")
    if isinstance(probe, str) and probe not in ("query", "solve"):
        raise ValueError(f"probe is {probe!r}; expected None, 'query', 'solve' or an array")
    for name, value in (("intercept", intercept), ("amplification", amplification)):
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if probe is None and not intercept:
        raise ValueError("probe is None with intercept=False, which leaves nothing; expected a probe")
    if amplification and (probe is None or not intercept):
        raise ValueError(
            f"amplification is True with {'probe=None' if probe is None else 'intercept=False'}; "
            "it divides the part of a probe beside an intercept"
        )
    solves = isinstance(probe, str) and probe == "solve"
    if solves and ridge is None:
        raise ValueError("ridge is None with probe='solve'; expected a number or an array of numbers")
    if not solves and ridge is not None:
        raise ValueError("ridge is given, but only probe='solve' takes one")
    if kernel == "gaussian" and scale < 0:
        raise ValueError(f"scale is {scale!r}; expected 0 or more with the Gaussian kernel")


def _shape(x) -> tuple[int, ...]:
    return tuple(int(n) for n in x.shape)


def _dims(name: str, x) -> tuple[int, ...]:
    shape = _shape(x)
    if len(shape) != 4:
        raise ValueError(f"{name} has shape {shape}; expected 4 axes, (batch, length, heads, head size)")
    return shape


def _keys_and_values(q, k, v, suffix: str = "") -> tuple[int, int, int, int]:
    outer, inner, kv_heads, head_dim = _dims(f"k{suffix}", k)
    if head_dim != _shape(q)[3]:
        raise ValueError(
            f"k{suffix} has head size {head_dim} (shape {_shape(k)}); expected {_shape(q)[3]}, that of q"
        )
    if v is None:
        return outer, inner, kv_heads, head_dim
    v_shape = _dims(f"v{suffix}", v)
    if v_shape[:3] != (outer, inner, kv_heads):
        raise ValueError(
            f"v{suffix} has shape {v_shape}; expected ({outer}, {inner}, {kv_heads}, Dv), "
            f"as k{suffix} has shape {_shape(k)}"
        )
    return outer, inner, kv_heads, v_shape[3]


def _check_probe_shape(q, r) -> None:
    if r is not None and _shape(r) != _shape(q):
        raise ValueError(f"r has shape {_shape(r)}; expected {_shape(q)}, that of q")


def _check_dtypes(q, k, v, r, dtypes: tuple[np.dtype, ...], suffix: str = "") -> None:
    for name, x in (("q", q), (f"k{suffix}", k), (f"v{suffix}", v), ("r", r)):
        if x is not None and np.dtype(x.dtype) not in dtypes:
            allowed = ", ".join(t.name for t in dtypes) + ("" if dtypes == DTYPES else " on a GPU")
            raise TypeError(f"{name} has dtype {np.dtype(x.dtype)}; expected one of {allowed}")
    dtype = np.dtype(q.dtype)
    for name, x in ((f"k{suffix}", k), (f"v{suffix}", v)):
        if x is not None and np.dtype(x.dtype) != dtype:
            raise TypeError(f"{name} has dtype {np.dtype(x.dtype)}; expected {dtype}, that of q")
    if r is not None and np.dtype(r.dtype) != dtype:
        # Solved probes are float32 or float64, and lose percents of the output in half precision.
        wider = [t for t in DTYPES[:2] if t in dtypes and t.itemsize > dtype.itemsize]
        if np.dtype(r.dtype) not in wider:
            expected = " or ".join([f"{dtype}, that of q", *(t.name for t in reversed(wider))])
            raise TypeError(f"r has dtype {np.dtype(r.dtype)}; expected {expected}")


def _check_heads(q_heads, kv_heads, head_dim, value_dim, max_head_dim, suffix: str = "") -> None:
    if (kv_heads == 0 and q_heads) or (kv_heads and q_heads % kv_heads):
        raise ValueError(f"q has {q_heads} heads; expected a multiple of {kv_heads}, the heads of k{suffix}")
    for name, size in (("q", head_dim), (f"v{suffix}", value_dim)):
        if size == 0:
            raise ValueError(f"{name} has head size 0; expected at least 1")
        if max_head_dim is not None and size > max_head_dim:
            raise ValueError(
                f"{name} has head size {size}; expected at most {max_head_dim} "
                "(parallax_core.reference takes any size)"
            )


def _is_real(x) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, (bool, np.bool_))


def _checked_scale(scale, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not _is_real(scale):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    # By comparisons: torch.compile traces these of a number that it does not know, and not math.isfinite.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; expected a finite number")
    return float(scale)


def _checked_window(window_size, causal: bool) -> int | None:
    if window_size is None:
        return None
    if not isinstance(window_size, numbers.Integral) or isinstance(window_size, bool):
        raise TypeError(f"window_size must be an integer or None, got {window_size!r}")
    if window_size < 1:
        raise ValueError(f"window_size is {window_size}; expected at least 1")
    if not causal:
        raise ValueError(f"window_size is {window_size} with causal=False; a window needs causal=True")
    return int(window_size)


def _readable(*index_arrays) -> bool:
    return all(isinstance(x, (np.ndarray, int)) for x in index_arrays)


def _checked_index(name: str, x, shape: tuple[int | None, ...]):
    if x.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} has dtype {x.dtype}; expected int32 or int64")
    if x.ndim != len(shape) or any(want is not None and want != n for want, n in zip(shape, x.shape)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {x.shape}; expected ({expected}{',' if len(shape) == 1 else ''})")
    return np.array(x, dtype=np.int64) if _readable(x) else x


def _check_range(name: str, x, low: int, high: int, what: str) -> None:
    if not _readable(x):
        return
    bad = np.flatnonzero((x < low) | (x > high))
    if bad.size:
        i = int(bad[0])
        raise ValueError(f"{name}[{i}] is {int(x[i])}; expected {low} to {high}, {what}")


def _checked_cu_seqlens(cu_seqlens, length: int):
    cu_seqlens = _checked_index("cu_seqlens", cu_seqlens, (None,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens is empty; expected (N+1,) offsets from 0 to the packed length")
    if not _readable(cu_seqlens):
        return cu_seqlens
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length:
        raise ValueError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; "
            f"expected 0 to {length}, the packed length"
        )
    falls = np.flatnonzero(np.diff(cu_seqlens) < 0)
    if falls.size:
        i = int(falls[0]) + 1
        raise ValueError(
            f"cu_seqlens[{i}] is {int(cu_seqlens[i])}, less than the {int(cu_seqlens[i - 1])} before it; "
            "expected offsets that never fall"
        )
    return cu_seqlens


def _check_pages(page_table, page_size, num_pages, cache_seqlens, cache_leftpad) -> None:
    """Every page that holds a valid key must exist; the other entries are never read."""
    slots = np.arange(page_table.shape[1])
    first = 0 if cache_leftpad is None else cache_leftpad // page_size
    last = -(-cache_seqlens // page_size)
    used = (slots >= np.reshape(first, (-1, 1))) & (slots < last[:, None])
    bad = np.argwhere(used & ((page_table < 0) | (page_table >= num_pages)))
    if bad.size:
        b, i = map(int, bad[0])
        raise ValueError(
            f"page_table[{b}, {i}] is {int(page_table[b, i])}; expected 0 to {num_pages - 1}, "
            "the pages of k_cache"
        )
