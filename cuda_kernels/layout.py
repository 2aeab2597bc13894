"""How the arrays of a call lie in memory: what a plan needs beside the problem."""

from __future__ import annotations

from typing import NamedTuple

Strides = tuple[int, int, int]


class Layout(NamedTuple):
    """Device and memory layout of a call.

    q, r, k, v, out: strides of the first three axes in elements, 0 along axes of size 1, of either sign; the
    last axis is dense; r is None without a probe, v where no values are asked for. aligned: the addresses of
    k and v, and their strides in bytes, are multiples of 16; aligned_queries: those of q and r. index_bits:
    32 or 64 for each index array that is there, all of them contiguous, by its name. split_size: keys a
    split, or None. num_pages: pages of the cache, or None.
    """

    device: int
    capability: tuple[int, int]
    multiprocessors: int
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
