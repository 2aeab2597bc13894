"""Hypothesis strategies for random calls of attention and decode, on every backend.

A case holds NumPy arrays and the options of the call, so that a test writes
``reference.parallax_attention(case.q, case.r, *case.keys_and_values, **case.options)`` and hands the same
arrays to another backend or framework. The numbers come from a drawn seed: hypothesis shrinks shapes, masks
and lengths, not single numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
FLOAT64 = DTYPES[:1]

SCALES = (None, 0.0, 0.3, 1.0, -0.5)


@dataclass(frozen=True)
class AttentionCase:
    """A call on whole sequences. Options: scale, causal, window_size, cu_seqlens."""

    q: np.ndarray
    r: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]

    @property
    def keys_and_values(self) -> tuple[np.ndarray, np.ndarray]:
        return self.k, self.v

    def with_keys_and_values(self, k, v) -> AttentionCase:
        return replace(self, k=k, v=v)


@dataclass(frozen=True)
class DecodeCase:
    """A call on a cache. Options: scale, window_size, cache_seqlens, cache_leftpad, page_table."""

    q: np.ndarray
    r: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    options: dict[str, Any]

    @property
    def keys_and_values(self) -> tuple[np.ndarray, np.ndarray]:
        return self.k_cache, self.v_cache

    def with_keys_and_values(self, k, v) -> DecodeCase:
        return replace(self, k_cache=k, v_cache=v)


seeds = st.integers(0, 2**32 - 1)


@st.composite
def attention_cases(
    draw,
    *,
    dtypes=DTYPES,
    min_length=0,
    max_length=8,
    max_batch=2,
    max_kv_heads=2,
    max_group=3,
    max_head_dim=5,
    max_value_dim=4,
    causal=(True, False),
    packed=(False, True),
    scales=SCALES,
    float32_probe=True,
):
    """Calls on whole sequences; lengths of queries and keys differ and may be 0 where ``min_length`` is."""
    dtype = draw(st.sampled_from(dtypes))
    is_packed = draw(st.sampled_from(packed))
    batch = 1 if is_packed else draw(st.integers(1, max_batch))
    kv_heads = draw(st.integers(1, max_kv_heads))
    heads = kv_heads * draw(st.integers(1, max_group))
    D, Dv = draw(st.integers(1, max_head_dim)), draw(st.integers(1, max_value_dim))
    options = {"scale": draw(st.sampled_from(scales)), "causal": draw(st.sampled_from(causal))}
    if options["causal"]:
        options["window_size"] = draw(st.none() | st.integers(1, max_length + 1))
    if is_packed:
        lengths = draw(st.lists(st.integers(min_length, max_length), min_size=1, max_size=3))
        q_len = kv_len = sum(lengths)
        index = draw(st.sampled_from((np.int32, np.int64)))
        options["cu_seqlens"] = np.concatenate(([0], np.cumsum(lengths))).astype(index)
    else:
        q_len, kv_len = (draw(st.integers(min_length, max_length)) for _ in range(2))
    arrays = _Arrays(draw, dtype)
    q = arrays.normal(batch, q_len, heads, D)
    k, v = arrays.normal(batch, kv_len, kv_heads, D), arrays.normal(batch, kv_len, kv_heads, Dv)
    return AttentionCase(q, arrays.probe(q.shape, float32_probe), k, v, options)


@st.composite
def decode_cases(
    draw,
    *,
    dtypes=DTYPES,
    max_queries=3,
    max_capacity=10,
    max_batch=3,
    max_kv_heads=2,
    max_group=3,
    max_head_dim=5,
    max_value_dim=4,
    paged=(False, True),
    page_sizes=(1, 2, 3, 4),
    scales=SCALES,
    float32_probe=True,
    head_dims=None,
):
    """Calls on a cache, paged or not, of valid lengths from 0 to the capacity and any left padding.

    head_dims: head sizes to draw from instead of all up to the largest, of queries and values alike. Page
    table entries that hold no valid key are numbers that no page has.
    """
    dtype = draw(st.sampled_from(dtypes))
    batch, q_len = draw(st.integers(1, max_batch)), draw(st.integers(1, max_queries))
    kv_heads = draw(st.integers(1, max_kv_heads))
    heads = kv_heads * draw(st.integers(1, max_group))
    if head_dims is None:
        D, Dv = draw(st.integers(1, max_head_dim)), draw(st.integers(1, max_value_dim))
    else:
        D, Dv = draw(st.sampled_from(head_dims)), draw(st.sampled_from(head_dims))
    options = {"scale": draw(st.sampled_from(scales))}
    options["window_size"] = draw(st.none() | st.integers(1, max_capacity + 1))
    index = draw(st.sampled_from((np.int32, np.int64)))
    is_paged = draw(st.sampled_from(paged))
    if is_paged:
        page_size = draw(st.sampled_from(page_sizes))
        pages = max(1, draw(st.integers(1, max_capacity)) // page_size)
        capacity = pages * page_size
    else:
        capacity = draw(st.integers(1, max_capacity))
    lengths = [capacity] * batch
    if is_paged or draw(st.booleans()):
        lengths = [draw(st.integers(0, capacity)) for _ in range(batch)]
        options["cache_seqlens"] = np.array(lengths, index)
    leftpad = [0] * batch
    if draw(st.booleans()):
        leftpad = [draw(st.integers(0, n)) for n in lengths]
        options["cache_leftpad"] = np.array(leftpad, index)
    arrays = _Arrays(draw, dtype)
    outer = (batch, capacity)
    if is_paged:
        num_pages = batch * pages + 2
        order = arrays.random.permutation(num_pages)
        table = order[: batch * pages].reshape(batch, pages).astype(index)
        slots = np.arange(pages)
        for b in range(batch):
            used = (slots >= leftpad[b] // page_size) & (slots < -(-lengths[b] // page_size))
            table[b, ~used] = draw(st.sampled_from((-1, 10**9)))
        options["page_table"] = table
        outer = (num_pages, page_size)
    q = arrays.normal(batch, q_len, heads, D)
    k, v = arrays.normal(*outer, kv_heads, D), arrays.normal(*outer, kv_heads, Dv)
    return DecodeCase(q, arrays.probe(q.shape, float32_probe), k, v, options)


class _Arrays:
    """Arrays of one case: one seed, one dtype, one memory layout."""

    def __init__(self, draw, dtype: np.dtype):
        self.draw, self.dtype = draw, dtype
        self.random = np.random.default_rng(draw(seeds))
        self.layout = draw(st.sampled_from(("contiguous", "heads first", "strided", "read-only")))

    def normal(self, *shape: int, dtype=None) -> np.ndarray:
        dtype = self.dtype if dtype is None else dtype
        if self.layout == "heads first":
            outer, length, heads, size = shape
            x = self.random.standard_normal((outer, heads, length, size)).astype(dtype)
            return x.transpose(0, 2, 1, 3)
        if self.layout == "strided":
            return self.random.standard_normal((*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::2]
        x = self.random.standard_normal(shape).astype(dtype)
        x.flags.writeable = self.layout != "read-only"
        return x

    def probe(self, shape, float32_probe: bool) -> np.ndarray:
        half = self.dtype.itemsize == 2
        wide = half and float32_probe and self.draw(st.booleans())
        return self.normal(*shape, dtype=np.dtype(np.float32) if wide else None)
