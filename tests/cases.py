"""Calls of chosen sizes, and the test that all their rows are within a bound."""

import numpy as np
from strategies import BFLOAT16, AttentionCase, DecodeCase


def make(
    *, seed=0, batch=2, length=1, kv_heads=2, group=4, head_dim=128, value_dim=None, capacity=640,
    dtype=BFLOAT16, page_size=None, packed=None, probe=None, layout="dense", **options,
):  # fmt: skip
    """A call of given sizes, on a cache, pages in random order, or on packed sequences of given lengths."""
    random = np.random.default_rng(seed)
    value_dim = head_dim if value_dim is None else value_dim

    def normal(*shape, dtype=dtype):
        if layout == "heads first":
            outer, positions, heads, size = shape
            return normal_dense(outer, heads, positions, size, dtype=dtype).swapaxes(1, 2)
        if layout == "strided":
            return normal_dense(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
        return normal_dense(*shape, dtype=dtype)

    def normal_dense(*shape, dtype):
        return random.standard_normal(shape).astype(dtype)

    outer = batch, capacity
    if packed is not None:
        batch, length = 1, sum(packed)
        outer = 1, length
        options["cu_seqlens"] = np.concatenate(([0], np.cumsum(packed))).astype(np.int32)
    if page_size is not None:
        pages = -(-capacity // page_size)
        outer = batch * pages + 3, page_size
        table = random.permutation(outer[0])[: batch * pages].reshape(batch, pages)
        options["page_table"] = table.astype(np.int32)
        options.setdefault("cache_seqlens", np.full(batch, capacity, np.int32))
    shape = batch, length, kv_heads * group, head_dim
    kind = DecodeCase if packed is None else AttentionCase
    return kind(
        normal(*shape), normal(*shape, dtype=dtype if probe is None else probe),
        normal(*outer, kv_heads, head_dim), normal(*outer, kv_heads, value_dim), options,
    )  # fmt: skip


def error_of_rows(result, expected):
    """The norm of each row's error over that of the row."""
    return np.linalg.norm(result - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def hold(result, expected, bound):
    """Rows whose error's norm is within the bound, and exactly 0 where they see no key."""
    error = np.linalg.norm(result.astype(np.float64) - expected, axis=-1)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else None
    assert (error <= bound).all(), f"row {worst}: error {error[worst]}, bound {bound[worst]}"
    nothing = (expected == 0).all(axis=-1)
    assert (result[nothing] == 0).all()
