"""Tensor maps: what the copy engine of sm_90 knows of keys or values in memory."""

from __future__ import annotations

import numpy as np
from cuda.bindings import driver

BYTES = 128
RUN = 64
"""Half-precision elements of a row that lie together in shared memory: 128 bytes, spread over all banks."""


def encode(
    address: int,
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int],
    heads: int,
    columns: int,
    box: int,
) -> np.ndarray:
    """The map of half-precision rows of ``columns`` elements, in runs of 128 bytes.

    address: aligned to 16 bytes. sizes: batch rows or pages, positions, units of ``heads`` adjacent heads.
    strides: in elements, of batch row or page, position and head, multiples of 16 bytes. box: positions of a
    copy. Returns 128 bytes. Raises RuntimeError where the driver refuses.
    """
    outer, length, units = sizes
    # A stride that is never taken may be anything but 0.
    by_outer, by_position, by_head = (2 * s or 2 * RUN for s in strides)
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    error, found = driver.cuTensorMapEncodeTiled(
        # Elements are only moved: either half-precision type will do.
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        5,
        address,
        [u64(n) for n in (RUN, length, columns // RUN, units, outer)],
        [u64(n) for n in (by_position, 2 * RUN, heads * by_head, by_outer)],
        [u32(n) for n in (RUN, box, columns // RUN, 1, 1)],
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
