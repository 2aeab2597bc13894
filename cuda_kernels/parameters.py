"""The arguments of the kernels, field by field as their headers declare them."""

from __future__ import annotations

import struct

import numpy as np

from parallax_core.problem import Problem

from .layout import Layout


def _structure(pointers: tuple[str, ...], strides: tuple[str, ...], integers, floats) -> np.dtype:
    return np.dtype(
        [(name, "u8") for name in pointers]
        + [(name, "i8", (3,)) for name in strides]
        + [("page_table_stride", "i8")]
        + [(name, "i4") for name in integers]
        + [(name, "f4") for name in floats],
        align=True,
    )


def _packers(pointers: tuple[str, ...], arrays: int) -> tuple[struct.Struct, struct.Struct]:
    """What writes the addresses of arrays, and those behind them: a state's, and of the workspace."""
    return struct.Struct(f"={arrays}Q"), struct.Struct(f"={len(pointers) - arrays}Q")


POINTERS = (
    "q", "r", "k", "v", "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table", "out",
    "m", "d1", "d2", "O1", "O2", "t0", "partials", "counters",
)  # fmt: skip
"""Addresses, 0 where absent; they come first, and are all that differs between launches of one plan."""
PROBLEM = _structure(
    POINTERS,
    ("q_stride", "r_stride", "k_stride", "v_stride", "out_stride"),
    (
        "batch", "q_len", "kv_len", "q_heads", "kv_heads",
        "sequences", "num_pages", "window", "causal",
        "cu_seqlens_wide", "cache_seqlens_wide", "cache_leftpad_wide", "page_table_wide",
        "row_blocks", "split_steps", "share", "surplus",
    ),
    ("scale_log2",),
)  # fmt: skip
"""Of softmax and Parallax attention: ``include/problem.cuh``."""
ARRAYS = POINTERS.index("out") + 1
"""How many of the addresses are of a call's arrays, which come before all others."""
PACK_ARRAYS, PACK_SHARED = _packers(POINTERS, ARRAYS)

LLA_POINTERS = (
    "q", "k", "v", "cu_seqlens", "cache_seqlens", "cache_leftpad", "page_table", "out", "ridge",
    "m", "d1", "k0", "wk", "wv", "wkk", "wvk", "state_q", "state_ridge", "partials", "counters",
    "mail",
)  # fmt: skip
LLA_CALL = _structure(
    LLA_POINTERS,
    ("q_stride", "k_stride", "v_stride", "out_stride", "ridge_stride"),
    (
        "q_len", "kv_len", "q_heads", "group_size", "head_dim", "value_dim",
        "sequences", "num_pages", "page_size", "window", "causal",
        "cu_seqlens_wide", "cache_seqlens_wide", "cache_leftpad_wide", "page_table_wide",
        "rows", "splits", "splits_log2", "first_row", "blocks_at_once",
    ),
    ("ridge_value", "scale"),
)  # fmt: skip
"""Of local linear attention: ``include/lla/rows.cuh``."""
LLA_ARRAYS = LLA_POINTERS.index("ridge") + 1
PACK_LLA_ARRAYS, PACK_LLA_SHARED = _packers(LLA_POINTERS, LLA_ARRAYS)


def masks_of(problem: Problem, layout: Layout) -> dict:
    """The fields of either structure that say which keys a row sees and where index arrays are wide."""
    fields = dict(window=problem.window_size or 0, causal=problem.causal)
    if problem.cu_seqlens is not None:
        fields["sequences"] = problem.cu_seqlens.shape[0] - 1
    if problem.page_table is not None:
        fields |= dict(page_table_stride=problem.page_table.shape[1], num_pages=layout.num_pages)
    return fields | {f"{name}_wide": bits == 64 for name, bits in layout.index_bits.items()}
