"""The argument of the attention kernels, field by field as ``include/problem.cuh`` declares it."""

from __future__ import annotations

import struct

import numpy as np

POINTERS = (
    "q", "r", "k", "v", "out", "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table",
    "m", "d1", "d2", "O1", "O2", "t0", "partials", "counters",
)  # fmt: skip
"""Addresses, 0 where absent; they come first, and are all that differs between launches of one plan."""

_STRIDES = ("q_stride", "r_stride", "k_stride", "v_stride", "out_stride")
_INDEX_STRIDES = ("cu_seqlens_stride", "cache_seqlens_stride", "cache_leftpad_stride")
_INTEGERS = (
    "batch", "q_len", "kv_len", "q_heads", "kv_heads",
    "sequences", "num_pages", "window", "causal",
    "cu_seqlens_wide", "cache_seqlens_wide", "cache_leftpad_wide", "page_table_wide",
    "row_blocks", "split_steps", "share", "surplus",
)  # fmt: skip

PROBLEM = np.dtype(
    [(name, "u8") for name in POINTERS]
    + [(name, "i8", (3,)) for name in _STRIDES]
    + [(name, "i8") for name in _INDEX_STRIDES]
    + [("page_table_stride", "i8", (2,))]
    + [(name, "i4") for name in _INTEGERS]
    + [("scale_log2", "f4")],
    align=True,
)

PACK_POINTERS = struct.Struct(f"={len(POINTERS)}Q")
