"""Tensor maps: what the copy engine of sm_90 knows of keys or values in memory."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from cuda.bindings import driver

from parallax_core.problem import Problem

from .layout import Layout, extents

BYTES = 128
RUN = 64
"""Half-precision elements of a row that lie together in shared memory: 128 bytes, spread over all banks."""
MOST_MAPS = 256
"""Pairs of caches of one plan whose tensor maps are kept."""


class Maps:
    """Tensor maps of a plan's keys and values, by their addresses; not for several threads at once."""

    def __init__(self, problem: Problem, layout: Layout, heads: int, box: int, runs: int | None = None):
        """heads: that share a row; box, runs: positions and runs of a copy, all runs by default."""
        self._problem, self._layout, self._heads, self._box, self._runs = problem, layout, heads, box, runs
        self._kept: OrderedDict[tuple[int, int], tuple[np.ndarray, int]] = OrderedDict()

    def address(self, k: int, v: int) -> int:
        """Where the kernel's argument lies, until another pair of caches is asked for."""
        key = k, v
        maps = self._kept.get(key)
        if maps is None:
            maps = self._encode(k, v)
            if len(self._kept) >= MOST_MAPS:
                self._kept.popitem(last=False)
            self._kept[key] = maps
        return maps[1]

    def _encode(self, k: int, v: int) -> tuple[np.ndarray, int]:
        problem, layout, heads = self._problem, self._layout, self._heads
        outer, length, kv_heads = extents(problem, layout)
        sizes = outer, length, kv_heads // heads
        maps = np.concatenate(
            [
                encode(
                    address, sizes, strides, heads, heads * size, self._box, self._runs or heads * size // RUN
                )
                for address, strides, size in (
                    (k, layout.k, problem.head_dim),
                    (v, layout.v, problem.value_dim),
                )
            ]
        )
        return maps, maps.ctypes.data


def encode(
    address: int,
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int],
    heads: int,
    columns: int,
    box: int,
    runs: int,
) -> np.ndarray:
    """The map of half-precision rows of ``columns`` elements, in runs of 128 bytes.

    address: aligned to 16 bytes. sizes: batch rows or pages, positions, units of ``heads`` adjacent heads.
    strides: in elements, of batch row or page, position and head, multiples of 16 bytes. box, runs: positions
    and runs of a copy. Returns 128 bytes. Raises RuntimeError where the driver refuses.
    """
    outer, length, units = sizes
    # Along an axis of one place a stride is never taken, and may be anything but 0.
    by_outer, by_position, by_head = (2 * s or 2 * RUN for s in strides)
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    error, found = driver.cuTensorMapEncodeTiled(
        # Elements are only moved: either half-precision type will do.
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        5,
        address,
        [u64(n) for n in (RUN, length, columns // RUN, units, outer)],
        [u64(n) for n in (by_position, 2 * RUN, heads * by_head, by_outer)],
        [u32(n) for n in (RUN, box, runs, 1, 1)],
        [u32(1)] * 5,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        # Promotion to 256 bytes costs a twentieth of the bandwidth here: a row is read but once.
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {error.name} for sizes {sizes}, strides {strides}")
    return np.array([int(word) for word in found.opaque], np.uint64).view(np.uint8)
