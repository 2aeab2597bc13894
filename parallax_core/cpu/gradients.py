"""Gradients on the CPU, of softmax, Parallax and local linear attention."""

from __future__ import annotations

import math

import numpy as np

from ..problem import Problem
from ..state import ParallaxState, SoftmaxState
from . import forward, gradient_loop, lla, threads, work
from .gradient_loop import LLA, PARALLAX, SOFTMAX
from .microkernel import padded
from .tiles import KEY_TILE, tensors

# Pieces of work per call, at least: key heads are cut into chunks of keys where there are fewer. Fixed, so
# that the same bits come out on any number of threads.
PIECES = 8
GRADIENT_ROWS = 96
_NO_PAGES = np.zeros((0, 0), np.int64)


def softmax_backward(problem: Problem, do, q, k, v, state: SoftmaxState):
    """dq, dk, dv in the compute dtype; do, q, k, v: NumPy arrays as the problem describes them."""
    numbers = _numbers(problem, SOFTMAX, do, q, k, v, None, state)
    dq, _, dk, dv = _differentiate(problem, SOFTMAX, do, q, k, v, (), numbers)
    return dq, dk, dv


def parallax_backward(problem: Problem, do, q, r, k, v, state: ParallaxState):
    """dq, dr, dk, dv in the compute dtype."""
    numbers = _numbers(problem, PARALLAX, do, q, k, v, r, state)
    return _differentiate(problem, PARALLAX, do, q, k, v, (r,), numbers)


def lla_backward(problem: Problem, do, q, k, v, ridge: np.ndarray, solver: str):
    """dq, dk, dv and dridge ``(B, Lq, Hq)`` in float64, by the implicit function of the system.

    The forward's weights, means and slopes are computed again: they cost less than keeping every row's
    second moments would.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite shows in its rows
        return _lla_backward(problem, do, q, k, v, ridge, solver)


def _lla_backward(problem: Problem, do, q, k, v, ridge: np.ndarray, solver: str):
    # What float32 loses of the slopes' products (see lla.WIDE) it loses twice over here, where both
    # solutions meet: with keys 16 standard deviations off the origin dq would keep two digits.
    dtype = lla.WIDE
    rows = problem.row_shape
    vbar, values = forward.attend(problem, q, k, v, return_state=True, dtype=dtype)
    # The derivative by the slopes is that of Parallax by its probe, up to the sign, whatever the probe is.
    still = np.zeros((*rows, problem.head_dim), dtype)
    flat = ParallaxState(
        values.m, values.d1, np.zeros(rows, dtype), values.O1, np.zeros_like(values.O1), np.zeros(rows, dtype)
    )
    numbers = _numbers(problem, PARALLAX, do, q, k, v, still, flat, dtype)
    _, du, _, _ = _differentiate(problem, PARALLAX, do, q, k, v, (still,), numbers, dtype, with_keys=False)
    np.negative(du, out=du)
    u, y, kbar = lla.solve_slopes(problem, q, k, ridge, solver, du)
    lam = np.broadcast_to(ridge, rows).astype(dtype)
    wide_q, g = q.astype(dtype), do.astype(dtype)
    o, _ = forward.attend(problem, q, k, v, -u, dtype=dtype)
    yu = (y * u).sum(-1)
    numbers = np.zeros((*rows, 7), dtype)
    numbers[..., gradient_loop.MAXIMUM], numbers[..., gradient_loop.NORMALISER] = values.m, values.d1
    numbers[..., gradient_loop.OUTPUT] = (g * o).sum(-1) - (y * wide_q).sum(-1) + lam * yu
    numbers[..., gradient_loop.MEAN] = (g * vbar).sum(-1)
    numbers[..., gradient_loop.CENTRE] = (u * kbar).sum(-1)
    numbers[..., gradient_loop.ADJOINT_CENTRE] = (y * kbar).sum(-1)
    dq, _, dk, dv = _differentiate(problem, LLA, do, q, k, v, (u, y), numbers, dtype)
    return dq + y, dk, dv, -yu


def _numbers(problem, kind, do, q, k, v, r, state, dtype=None) -> np.ndarray:
    dtype = problem.compute_dtype if dtype is None else dtype
    numbers = np.zeros((*problem.row_shape, 7), dtype)
    none = np.zeros((0,) * 3, dtype), np.zeros((0,) * 4, dtype)
    described = tensors(do)
    m, d1, O1 = (np.ascontiguousarray(x, dtype) for x in (state.m, state.d1, state.O1))
    d2, t0, O2 = none[0], none[0], none[1]
    if kind == PARALLAX:
        d2, t0, O2 = (np.ascontiguousarray(x, dtype) for x in (state.d2, state.t0, state.O2))
    gradient_loop.row_numbers(
        described.table,
        0,
        work.sequence_table(problem),
        problem.group_size,
        kind,
        m,
        d1,
        d2,
        t0,
        O1,
        O2,
        numbers,
    )
    return numbers


def _differentiate(problem, kind, do, q, k, v, probes, numbers, dtype=None, with_keys=True):
    dtype = problem.compute_dtype if dtype is None else np.dtype(dtype)
    sequences = work.sequence_table(problem)
    chunks = _chunks(problem, sequences)
    items = _items(problem, sequences, chunks)
    rows_shape = (chunks, *problem.row_shape, problem.head_dim)
    dq = np.zeros(rows_shape, dtype)
    dr = np.zeros(rows_shape if kind == PARALLAX else (0,) * 5, dtype)
    keys = problem.batch, problem.kv_len, problem.kv_heads
    dk = np.zeros((*keys, problem.head_dim) if with_keys else (0,) * 4, dtype)
    dv = np.zeros((*keys, problem.value_dim) if with_keys else (0,) * 4, dtype)
    if len(items):
        described = tensors(q, k, v, *probes, do)
        most = int((sequences[:, 2] - sequences[:, 1]).max()) * problem.group_size
        threads.run(
            gradient_loop.differentiate, len(items),
            items, sequences, described.table, _NO_PAGES, 0, max(1, min(GRADIENT_ROWS, most)), most,
            problem.head_dim, problem.value_dim, problem.group_size, problem.causal, problem.window_size or 0,
            dtype.type(problem.scale), kind, numbers, len(described.table) - 1, with_keys, dq, dr, dk, dv,
        )  # fmt: skip
    # Always in the order of the chunks, whoever computed them.
    dq = dq[0] if chunks == 1 else dq.sum(axis=0)
    if kind == PARALLAX:
        dr = dr[0] if chunks == 1 else dr.sum(axis=0)
    return dq, dr, dk, dv


def _chunks(problem: Problem, sequences: np.ndarray) -> int:
    heads = max(1, len(sequences) * problem.kv_heads)
    longest = int((sequences[:, 4] - sequences[:, 3]).max(initial=1))
    return max(1, min(-(-PIECES // heads), -(-longest // (4 * KEY_TILE))))


def _items(problem: Problem, sequences: np.ndarray, chunks: int) -> np.ndarray:
    """``(n, 5)`` int64 items for :func:`gradient_loop.differentiate`, the longest first."""
    table = []
    for n, (_, begin, end, first, last) in enumerate(sequences.tolist()):
        if end == begin or last == first:
            continue
        size = padded(math.ceil((last - first) / chunks), KEY_TILE)
        for chunk in range(chunks):
            low, high = first + chunk * size, min(last, first + (chunk + 1) * size)
            # Every chunk has its place in the sums, filled with zeros where no keys are left.
            table += [(n, h, low, max(low, high), chunk) for h in range(problem.kv_heads) if low < high]
    items = np.array(table, dtype=np.int64).reshape(-1, 5)
    return items[np.argsort(items[:, 2] - items[:, 3], kind="stable")]
