"""Tiles of queries, keys and values: read from any strides, pages and storage type into workspaces."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numba import njit

from .intrinsics import BF16, F16, F32, F64, fetch_add, load_bf16, load_f16, load_f32, load_f64, prefetch
from .microkernel import NR, SQUARE, transpose_block

KEY_TILE = 64
"""Keys of a tile."""
KEY_STRIDE = KEY_TILE + 16
"""Columns between the rows of a tile of scores; see ``stride``."""
ROW_TILE = 96
"""Query rows of a tile at most; a multiple of every microkernel's row count."""

_LINE = 16
"""float32 elements of a cache line."""
_AHEAD = 8
"""Keys between the one read and the one asked for."""

_CODES = {
    np.dtype(np.float64): F64,
    np.dtype(np.float32): F32,
    np.dtype(ml_dtypes.bfloat16): BF16,
    np.dtype(np.float16): F16,
}
_ABSENT = (0, 0, 0, 0, 0)


class Tensors(NamedTuple):
    """Address, element strides of the first three axes and storage code of a call's arrays.

    The kernels see arrays as these numbers alone, so that one compiled kernel serves every layout and
    storage type. ``table`` is ``(n, 5)`` int64; ``owners`` keeps the arrays alive.
    """

    table: np.ndarray
    owners: tuple


def tensors(*arrays: np.ndarray | None) -> Tensors:
    """Describe four-axis arrays for the kernels, None as absent; only a strided last axis is copied."""
    owners = tuple(x if x is None or _dense_last_axis(x) else np.ascontiguousarray(x) for x in arrays)
    rows = [
        _ABSENT if x is None else (x.ctypes.data, *(s // x.itemsize for s in x.strides[:3]), _CODES[x.dtype])
        for x in owners
    ]
    return Tensors(np.array(rows, dtype=np.int64), owners)


def _dense_last_axis(x: np.ndarray) -> bool:
    return (x.shape[-1] <= 1 or x.strides[-1] == x.itemsize) and all(s % x.itemsize == 0 for s in x.strides)


@njit(nogil=True, cache=True, error_model="numpy")
def stride(columns):
    """Columns between the rows of a workspace: padded for the microkernel, and an odd number of lines.

    A microkernel walks down columns of a tile. With rows a power of two apart all of its lines would fall
    into the same few sets of the first-level cache and evict one another.
    """
    width = (columns + NR - 1) // NR * NR
    return width if width // _LINE % 2 else width + _LINE


@njit(nogil=True, cache=True, error_model="numpy")
def workspace(rows, columns, dtype):
    """Zeros ``(rows, columns)`` that begin a cache line: a vector that straddles two costs two loads."""
    elements = np.zeros(rows * columns + 64, dtype)
    first = (64 - elements.ctypes.data % 64) % 64 // elements.itemsize
    return elements[first : first + rows * columns].reshape((rows, columns))


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def read_row(tensor, a, b, c, to, at, size):
    """to[at, i] = tensor[a, b, c, i] for i < size."""
    base = a * tensor[1] + b * tensor[2] + c * tensor[3]
    address, code = tensor[0], tensor[4]
    if code == F32:
        for i in range(size):
            to[at, i] = load_f32(address, base + i)
    elif code == F64:
        for i in range(size):
            to[at, i] = load_f64(address, base + i)
    elif code == BF16:
        for i in range(size):
            to[at, i] = load_bf16(address, base + i)
    else:
        for i in range(size):
            to[at, i] = load_f16(address, base + i)


@njit(nogil=True, cache=True, error_model="numpy")
def read_query_rows(tensor, sequence, head, group, first, count, size, to, at):
    """Rows ``first`` and on of a key head's query rows, ``row = query * group + head within the group``."""
    for i in range(count):
        row = first + i
        query_head = head * group + row % group
        read_row(tensor, sequence[0], sequence[1] + row // group, query_head, to, at + i, size)


@njit(nogil=True, cache=True, error_model="numpy")
def read_keys(tensor, sequence, page_table, page_size, head, first, count, size, to, at):
    """Positions ``first`` and on of a sequence, one a row of ``to`` from its row ``at``.

    With heads between the positions, the processor does not see which lines come next: they are asked for.
    """
    itemsize = 8 if tensor[4] == F64 else (4 if tensor[4] == F32 else 2)
    for j in range(count):
        a, b = sequence[0], first + j
        if page_size > 0:
            a, b = page_table[a, b // page_size], b % page_size
        read_row(tensor, a, b, head, to, at + j, size)
        if page_size == 0:
            ahead = a * tensor[1] + (b + _AHEAD) * tensor[2] + head * tensor[3]
            for line in range(0, size * itemsize, 64):
                prefetch(tensor[0] + ahead * itemsize + line)


@njit(nogil=True, cache=True, error_model="numpy")
def transpose(tile, columns, to, at):
    """to[at + i, j] = tile[j, i] for i < columns and all KEY_TILE rows j; both are padded to whole blocks."""
    for i in range(0, columns, SQUARE):
        for j in range(0, KEY_TILE, SQUARE):
            transpose_block(
                tile, j * tile.shape[1] + i, tile.shape[1], to, (at + i) * to.shape[1] + j, to.shape[1]
            )


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def visible(sequence, query, causal, window):
    """First position that query ``query`` of the sequence sees, and the one after its last."""
    first, end = sequence[3], sequence[4]
    if causal:
        end = min(end, end - (sequence[2] - sequence[1]) + query + 1)
        if window > 0:
            first = max(first, end - window)
    return first, max(first, end)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def all_finite(tile, first, rows, columns):
    """Whether no element of ``tile[first:first+rows, :columns]`` is NaN or infinite."""
    total = tile.dtype.type(0)
    for i in range(first, first + rows):
        for j in range(columns):
            total += tile[i, j] * tile.dtype.type(0)
    return total == 0


@njit(nogil=True, cache=True, error_model="numpy")
def key_rows(head_dim):
    """Rows that the packed keys of a tile take: whole blocks of the transposition."""
    return (head_dim + SQUARE - 1) // SQUARE * SQUARE


@njit(nogil=True, cache=True, error_model="numpy")
def pack(counter, sequences, starts, tensors, head_dim, value_dim, keys_out, values_out, finite_out):
    """Write all keys and values of whole sequences as the tiles that a row tile would read.

    With heads between the positions every key lies in a page of its own; read again for each tile of rows
    that costs more than the copy. All heads of a position are read at about the same time, as neighbours in
    memory. Tiles lie one below the other, those of sequence ``n`` from ``starts[n]`` of each head. keys_out:
    ``(H * tiles * key_rows(D), KEY_STRIDE)``, transposed; values_out: ``(H * tiles * KEY_TILE, stride(Dv))``;
    finite_out: ``(H, tiles)``, whether all values are. The rest of a last tile may be anything.
    """
    K = workspace(KEY_TILE, stride(head_dim), keys_out.dtype)
    no_pages = np.zeros((0, 0), np.int64)
    tiles = finite_out.shape[1]
    while True:
        tile = fetch_add(counter)
        if tile >= tiles:
            break
        n = np.searchsorted(starts, tile, side="right") - 1
        sequence = sequences[n]
        key = sequence[3] + (tile - starts[n]) * KEY_TILE
        keys = min(KEY_TILE, sequence[4] - key)
        for head in range(finite_out.shape[0]):
            at = head * tiles + tile
            read_keys(tensors[1], sequence, no_pages, 0, head, key, keys, head_dim, K, 0)
            transpose(K, head_dim, keys_out, at * key_rows(head_dim))
            read_keys(
                tensors[2], sequence, no_pages, 0, head, key, keys, value_dim, values_out, at * KEY_TILE
            )
            finite_out[head, tile] = all_finite(values_out, at * KEY_TILE, keys, value_dim)
