"""The pieces of work of a problem: which rows and keys a thread takes at a time."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .tiles import ROW_TILE

SPLIT_KEYS = 512
"""Keys of a split of a cache. Fixed, so that a sequence gives the same bits on any number of threads."""


def sequence_table(problem: Problem) -> np.ndarray:
    """``(N, 5)`` int64 rows of :class:`Sequence`."""
    return np.array(list(problem.sequences()), dtype=np.int64).reshape(-1, 5)


def tile_rows(problem: Problem, sequences: np.ndarray, most: int = ROW_TILE) -> int:
    """Rows of a tile: no more than a key head's query rows of the longest sequence."""
    longest = int((sequences[:, 2] - sequences[:, 1]).max(initial=1)) * problem.group_size
    return max(1, min(most, longest))


def items(problem: Problem, sequences: np.ndarray, rows: int, splits: int = 1, heads: int = 1) -> np.ndarray:
    """``(n, 7)`` int64 items for :func:`tile_loop.attend`, the longest first so that threads end together.

    rows: of a tile; splits: of the keys; heads: key heads of an item.
    """
    item_heads = problem.kv_heads // heads
    per_head = (sequences[:, 2] - sequences[:, 1]) * problem.group_size
    tiles = -(-per_head // rows)
    counts = tiles * item_heads * splits
    total = int(counts.sum())
    table = np.empty((total, 7), np.int64)
    sequence = np.repeat(np.arange(len(sequences)), counts)
    rest = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    split, rest = rest % splits, rest // splits
    head, tile = rest % item_heads * heads, rest // item_heads
    first, end = sequences[sequence, 3], sequences[sequence, 4]
    table[:, 0], table[:, 1] = sequence, head
    table[:, 2] = tile * rows
    table[:, 3] = np.minimum(table[:, 2] + rows, per_head[sequence])
    if splits > 1:
        first = np.maximum(first, split * SPLIT_KEYS)
        end = np.maximum(first, np.minimum(end, (split + 1) * SPLIT_KEYS))
    table[:, 4], table[:, 5], table[:, 6] = first, end, split
    keys = end - first
    if problem.causal and splits == 1 and total:
        last_query = (table[:, 3] - 1) // problem.group_size
        length = sequences[sequence, 2] - sequences[sequence, 1]
        keys = np.clip(keys - length + 1 + last_query, 0, problem.window_size)
    return table[np.lexsort((-keys, table[:, 1], table[:, 0]))]
