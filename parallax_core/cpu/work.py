"""The pieces of work of a problem: which rows and keys a thread takes at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..problem import Problem
from .tiles import ROW_TILE

SPLIT_KEYS = 512
"""Keys of a split of a cache. Fixed, so that a sequence gives the same bits on any number of threads."""


def sequence_table(problem: Problem) -> np.ndarray:
    """``(N, 5)`` int64 rows of :class:`Sequence`."""
    return np.array(list(problem.sequences()), dtype=np.int64).reshape(-1, 5)


def tile_rows(problem: Problem, sequences: np.ndarray, most: int = ROW_TILE) -> int:
    """Rows of a tile: no more than a key head's query rows of the longest sequence."""
    return max(1, min(most, max(1, longest(sequences)[0]) * problem.group_size))


@njit(nogil=True, cache=True)
def longest(sequences):
    """The most queries of a sequence, and the farthest end of the keys of one; 0 where there is none."""
    queries, end = 0, 0
    for n in range(sequences.shape[0]):
        queries = max(queries, sequences[n, 2] - sequences[n, 1])
        end = max(end, sequences[n, 4])
    return queries, end


def items(problem: Problem, sequences: np.ndarray, rows: int, splits: int = 1, heads: int = 1) -> np.ndarray:
    """``(n, 7)`` int64 items for :func:`tile_loop.attend`, the last rows of a sequence first.

    With a causal mask they see the most keys, so that threads end together. rows: of a tile; splits: of the
    keys; heads: key heads of an item.
    """
    return _items(sequences, problem.kv_heads // heads, heads, problem.group_size, rows, splits)


# Compiled, since a decode call's Python runs from caches that the call before it has swept: in NumPy's
# operations this took 0.1 ms of it.
@njit(nogil=True, cache=True)
def _items(sequences, item_heads, heads, group, rows, splits):
    count = 0
    for n in range(sequences.shape[0]):
        count += ((sequences[n, 2] - sequences[n, 1]) * group + rows - 1) // rows * item_heads * splits
    table, at = np.empty((count, 7), np.int64), 0
    for n in range(sequences.shape[0]):
        total = (sequences[n, 2] - sequences[n, 1]) * group
        for head in range(item_heads):
            for tile in range((total + rows - 1) // rows - 1, -1, -1):
                for split in range(splits):
                    first, end = sequences[n, 3], sequences[n, 4]
                    if splits > 1:
                        first = max(first, split * SPLIT_KEYS)
                        end = max(first, min(end, (split + 1) * SPLIT_KEYS))
                    table[at, 0], table[at, 1] = n, head * heads
                    table[at, 2], table[at, 3] = tile * rows, min((tile + 1) * rows, total)
                    table[at, 4], table[at, 5], table[at, 6] = first, end, split
                    at += 1
    return table
