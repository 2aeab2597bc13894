"""Softmax and Parallax on the CPU: whole sequences, caches, and the family between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import exchange
from ..problem import Problem
from ..state import ParallaxState, SoftmaxState
from . import threads, tile_loop, work
from .few_rows import MOST_ROWS
from .tiles import KEY_STRIDE, KEY_TILE, key_rows, pack, stride, tensors

_NO_PAGES = np.zeros((0, 0), np.int64)
KERNELS = {"dot": tile_loop.DOT, "gaussian": tile_loop.GAUSSIAN}


class Plan(NamedTuple):
    """A problem as the kernels take it: ``rows`` of a tile, ``heads`` of an item."""

    sequences: np.ndarray
    items: np.ndarray
    splits: int
    rows: int
    heads: int
    page_table: np.ndarray
    page_size: int


def plan(problem: Problem, most_rows: int, *, few: bool = False, split: bool = False) -> Plan:
    """Cut a problem into pieces.

    few: take all heads of a position together where there are few rows a head. split: cut the keys too
    where that is all that can be cut.
    """
    sequences = work.sequence_table(problem)
    rows = work.tile_rows(problem, sequences, most_rows)
    queries, end = work.longest(sequences)
    splits = 1
    if split and rows >= queries * problem.group_size:
        splits = max(1, -(-end // work.SPLIT_KEYS))
    heads = max(1, problem.kv_heads) if few and rows <= MOST_ROWS else 1
    return Plan(
        sequences,
        work.items(problem, sequences, rows, splits, heads),
        splits,
        rows,
        heads,
        _NO_PAGES if problem.page_table is None else problem.page_table,
        problem.page_size or 0,
    )


def attend(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    r: np.ndarray | None = None,
    *,
    return_state: bool = False,
    kernel: str = "dot",
    intercept: bool = True,
    amplification: bool = False,
    dtype: np.dtype | None = None,
):
    """The reduction over the keys that every estimator shares.

    q, k, v, r: NumPy arrays of any strides, as ``problem`` describes them. dtype: what to compute in, the
    problem's compute dtype unless given.
    Returns ``(out, state)``: ``(B, Lq, Hq, Dv)`` in the compute dtype and a SoftmaxState, a ParallaxState or
    None.
    """
    dtype = problem.compute_dtype if dtype is None else np.dtype(dtype)
    shape, rows_shape = problem.output_shape, problem.row_shape
    out = exchange.empty(shape, dtype)
    dot = kernel == "dot"
    cut = plan(problem, work.ROW_TILE, few=dot, split=intercept and not amplification)
    few = dot and cut.rows <= MOST_ROWS
    stored = return_state or cut.splits > 1
    none = np.zeros((0,) * 4, dtype), np.zeros((0,) * 5, dtype)

    def rows(want: bool) -> np.ndarray:
        return np.empty((cut.splits, *rows_shape), dtype) if want else none[0]

    def channels(want: bool) -> np.ndarray:
        return np.empty((cut.splits, *shape), dtype) if want else none[1]

    probed = r is not None
    m, d1, O1 = rows(stored), rows(stored), channels(stored)
    d2, t0, O2 = rows(stored and probed), rows(stored and probed), channels(stored and probed)
    if len(cut.items):
        described = tensors(q, k, v, r)
        packed = _pack(problem, cut, described.table, dtype)
        threads.run(
            tile_loop.attend, len(cut.items),
            cut.items, cut.sequences, described.table, cut.page_table, cut.page_size, cut.rows * cut.heads,
            problem.head_dim, problem.value_dim, problem.group_size, cut.heads, few, problem.causal,
            problem.window_size or 0,
            KERNELS[kernel], dtype.type(problem.scale), intercept, amplification, *packed,
            out if cut.splits == 1 else np.zeros((0,) * 4, dtype), m, d1, d2, t0, O1, O2,
        )  # fmt: skip
        if cut.splits > 1:
            tile_loop.merge_splits(m, d1, d2, t0, O1, O2, out)
    if not return_state:
        return out, None
    if probed:
        return out, ParallaxState(m[0], d1[0], d2[0], O1[0], O2[0], t0[0])
    return out, SoftmaxState(m[0], d1[0], O1[0])


def _pack(problem: Problem, cut: Plan, table: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Keys and values as tiles, where several tiles of rows read each; else arrays of size 0."""
    queries, _ = work.longest(cut.sequences)
    if cut.page_size or problem.kv_len == 0 or queries * problem.group_size <= 2 * cut.rows:
        none = (np.zeros((0,) * 2, dtype) for _ in range(2))
        return np.zeros(0, np.int64), *none, np.zeros((0,) * 2, np.bool_)
    counts = -(-(cut.sequences[:, 4] - cut.sequences[:, 3]) // KEY_TILE)
    starts = np.cumsum(counts) - counts
    tiles = int(counts.sum())
    keys = exchange.empty((problem.kv_heads * tiles * key_rows(problem.head_dim), KEY_STRIDE), dtype)
    values = exchange.empty((problem.kv_heads * tiles * KEY_TILE, stride(problem.value_dim)), dtype)
    finite = np.zeros((problem.kv_heads, tiles), np.bool_)
    threads.run(
        pack, tiles, cut.sequences, starts, table, problem.head_dim, problem.value_dim, keys, values, finite,
    )  # fmt: skip
    return starts, keys, values, finite
