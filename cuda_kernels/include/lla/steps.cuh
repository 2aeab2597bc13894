#pragma once
// What the steps of conjugate gradients are made of, by all matrix warps of a block, or of all blocks that share a row.
//
// The shape of the kernel comes before this; its Shared has in `solving` the vectors that go round: the right-hand side, and the product of
// two steps in turn.

#include "lla/vectors.cuh"
#include "ptx/barrier.cuh"

__device__ __forceinline__ void meet_matrix_warps() { barrier_sync(MATRIX, MATRIX_THREADS); }

// run: the query's first, where there are several.
__device__ __forceinline__ float query_at(const Shared& shared, int column, int run = 0) {
  return widen<BFLOAT>(reinterpret_cast<const half_bits*>(shared.query[run + column / 64])[column % 64]);
}

// The lane's entries of the right-hand side.
template <class Block>
__device__ __forceinline__ Entries right_side(Block& shared, int lane) { return entries_of_lane(shared.solving.right, lane); }

// Of a product a lane has a row of each of its warpgroup's blocks of 64.
struct Rows {
  float of[ROW_BLOCKS];
  float curvature;  // the vector's inner product with the warp's rows, in all lanes, if it was asked for
};

// A warp's instructions follow one another as they are written here: what lanes give each other is waited for together.
template <bool WITH_CURVATURE>
__device__ __forceinline__ Rows multiply_rows_of_warp(LyingVector& vector, const float* moments, int thread) {
  RowSums sums[ROW_BLOCKS];
  Rows rows = {};
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++) {
    sums[b].multiply(vector, moments + b * D / 2, thread);
    if constexpr (WITH_CURVATURE) rows.curvature += sums[b].with_vector(vector, thread, b * 64);
  }
#pragma unroll
  for (int i = 0; i < (WITH_CURVATURE ? SUM_EXCHANGES : ROW_EXCHANGES); i++) {
    if constexpr (WITH_CURVATURE) rows.curvature += __shfl_xor_sync(~0u, rows.curvature, 16 >> i);
#pragma unroll
    for (int b = 0; b < ROW_BLOCKS && i < ROW_EXCHANGES; b++) sums[b].exchange(i, thread);
  }
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++) rows.of[b] = sums[b].row;
  return rows;
}

// Where a lane leaves its rows of a product, and finds its entries of it when all warps have come: in two places in turn.
struct ProductPlace {
  LyingVector& product;
  int thread;

  template <class Block, class Number>
  __device__ __forceinline__ ProductPlace(Block& shared, int thread, Number number)
      : product(shared.solving.product[number % 2]), thread(thread) {}

  __device__ __forceinline__ void leave(const Rows& rows) const {
    if (thread % 4 >= 2) return;
#pragma unroll
    for (int b = 0; b < ROW_BLOCKS; b++) entry_of_row(product, b * 64 + row_of_product(thread)) = rows.of[b];
  }
  __device__ __forceinline__ Entries find() const { return entries_of_lane(product, thread % 32); }
};
