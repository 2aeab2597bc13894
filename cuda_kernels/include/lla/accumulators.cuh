#pragma once
// How a matrix product lies over a warpgroup's registers.

// Row and column of accumulator 4 j are those of a 16 x 8 product: `upper`, 8 j + 2 (thread % 4).
__device__ __forceinline__ int upper_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
