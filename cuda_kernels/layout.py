"""How the arrays of a call lie in memory: what a plan needs beside the problem."""

from __future__ import annotations

from typing import NamedTuple

from parallax_core.problem import Problem

Strides = tuple[int, int, int]


class Layout(NamedTuple):
    """Device and memory layout of a call.

    cache_bytes: of the device's second-level cache. shared_bytes: of shared memory that a block may have.
    q, r, k, v, out: strides of the first three axes in elements, 0 along axes of size 1, of either sign; the
    last axis is dense; r is None without a probe, v where no values are asked for. aligned: the addresses of
    k and v, and their strides in bytes, are multiples of 16; aligned_queries: those of q and r. index_bits:
    32 or 64 for each index array that is there, all of them contiguous, by its name. split_size: keys a
    split, or None. num_pages: pages of the cache, or None.
    """

    device: int
    capability: tuple[int, int]
    multiprocessors: int
    cache_bytes: int
    shared_bytes: int
    q: Strides
    r: Strides | None
    k: Strides
    v: Strides | None
    out: Strides
    aligned: bool
    aligned_queries: bool
    index_bits: dict[str, int]
    return_state: bool
    split_size: int | None
    num_pages: int | None


def extents(problem: Problem, layout: Layout) -> tuple[int, int, int]:
    """Places along the first three axes of keys and values: batch rows or pages, positions, heads."""
    if problem.page_size is None:
        return problem.batch, problem.kv_len, problem.kv_heads
    return layout.num_pages, problem.page_size, problem.kv_heads


def has_tensor_maps(problem: Problem, layout: Layout) -> bool:
    """Whether keys and values can be described to the copy engine of sm_90.

    It takes aligned arrays alone, and no stride that is negative, or that is 0 along an axis of several
    places, as of a cache that is broadcast over a batch or over heads.
    """
    sizes = extents(problem, layout)
    return layout.aligned and all(
        stride > 0 or (stride == 0 and size <= 1)
        for strides in (layout.k, layout.v)
        for size, stride in zip(sizes, strides)
    )


def most_bytes(problem: Problem) -> int:
    """Of the keys and values that a call may read, each once."""
    keys = problem.batch * problem.kv_len * problem.kv_heads
    return keys * (problem.head_dim + problem.value_dim) * problem.dtype.itemsize


def overflows_cache(problem: Problem, layout: Layout) -> bool:
    """Whether the keys and values of a call are more than the second-level cache holds.

    False for pages, which sequences may share, and for splits of a pinned size, whose kernel is the same in
    any batch.
    """
    counts = problem.page_size is None and layout.split_size is None
    return counts and most_bytes(problem) > layout.cache_bytes
