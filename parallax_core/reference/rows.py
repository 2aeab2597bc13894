"""The query rows of a problem with the keys and values that they see, as dense float64 arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..problem import Problem


class Block(NamedTuple):
    """Rows of one query head of one sequence, and the keys that at least one of them sees.

    rows: the index of the rows in ``(B, Lq, Hq)``; keys: ``(n, D)`` and values: ``(n, Dv)`` (None where the
    call has none), float64; visible: ``(number of rows, n)``, which key each row sees. A block that holds a
    number that is not finite has only rows that see all of its keys, so that 0 * NaN never arises from a
    hidden key and products with the whole of ``keys`` and ``values`` are right.
    """

    rows: tuple[int, slice, int]
    keys: np.ndarray
    values: np.ndarray | None
    visible: np.ndarray


def blocks(problem: Problem, k: np.ndarray, v: np.ndarray | None) -> Iterator[Block]:
    """The blocks of a call, which cover every row of ``(B, Lq, Hq)`` once; unseen keys are never read."""
    for batch, rows, positions, visible in _masks(problem):
        seen = visible.any(axis=0)
        positions, visible = positions[seen], visible[:, seen]
        for head in range(problem.q_heads):
            index = _gather_index(problem, batch, positions, head // problem.group_size)
            keys = k[index].astype(np.float64)
            values = None if v is None else v[index].astype(np.float64)
            finite = np.isfinite(keys).all() and (values is None or np.isfinite(values).all())
            if finite or visible.all():
                yield Block((batch, rows, head), keys, values, visible)
                continue
            for i, sees in enumerate(visible):
                row = slice(rows.start + i, rows.start + i + 1)
                row_values = None if values is None else values[sees]
                yield Block((batch, row, head), keys[sees], row_values, sees[None, sees])


def _masks(problem: Problem) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """For each sequence its batch, its rows, the positions of its keys and which row sees which of them."""
    if problem.cu_seqlens is not None:
        for begin, end in zip(problem.cu_seqlens[:-1].tolist(), problem.cu_seqlens[1:].tolist()):
            positions = np.arange(begin, end)
            yield 0, slice(begin, end), positions, _visible(problem, end - begin, positions, end)
        return
    for batch in range(problem.batch):
        first = 0 if problem.cache_leftpad is None else int(problem.cache_leftpad[batch])
        end = problem.kv_len if problem.cache_seqlens is None else int(problem.cache_seqlens[batch])
        positions = np.arange(first, end)
        yield batch, slice(0, problem.q_len), positions, _visible(problem, problem.q_len, positions, end)


def _visible(problem: Problem, q_len: int, positions: np.ndarray, end: int) -> np.ndarray:
    """Which of ``positions`` each of ``q_len`` rows sees: masks are aligned to the end of the keys."""
    if not problem.causal:
        return np.ones((q_len, positions.size), bool)
    newest = end - q_len + np.arange(q_len)[:, None]
    visible = positions <= newest
    if problem.window_size is not None:
        visible &= positions > newest - problem.window_size
    return visible


def _gather_index(problem: Problem, batch: int, positions: np.ndarray, kv_head: int) -> tuple:
    if problem.page_table is None:
        return batch, positions, kv_head
    page, place = np.divmod(positions, problem.page_size)
    return problem.page_table[batch, page], place, kv_head
