#pragma once
// A row's query and output, and the query as the matrix units take it.

#include "lla/inputs.cuh"
#include "lla/rows.cuh"
#include "ptx/numbers.cuh"
#include "ptx/opaque.cuh"

// Of blocks whose number in their row is a power of two: the row's number, and which of its blocks this one is.
__device__ __forceinline__ int item_of_block(const lla::Call& call) { return block_index() >> call.splits_log2; }
__device__ __forceinline__ int block_of_row(const lla::Call& call) { return block_index() & (call.splits - 1); }

__device__ __forceinline__ const half_bits* query_of(const lla::Call& call, const lla::RowIndex& row) {
  return static_cast<const half_bits*>(call.q) + row.offset(call.q_stride);
}

__device__ __forceinline__ half_bits* output_of(const lla::Call& call, const lla::RowIndex& row) {
  return static_cast<half_bits*>(call.out) + row.offset(call.out_stride);
}

// A thread's 16 bytes of the query with the zeros beside it, as the matrix units take it; by the first threads. They are on
// their way until they are packed.
constexpr int VECTOR = 8 * 128;  // a vector as row 0 of an operand; the other seven rows are zero
constexpr int QUERY_PIECES = D / 64 * VECTOR / 16;
struct QueryPiece {
  half_bits q[8];

  __device__ __forceinline__ void load(const half_bits* query, int thread) {
    const int run = thread / (VECTOR / 16), in_run = thread % (VECTOR / 16);
    // Row 0 is not swizzled.
    const bool is_there = thread < QUERY_PIECES && in_run < 8;
#pragma unroll
    for (int e = 0; e < 8; e++) q[e] = is_there ? query[run * 64 + in_run * 8 + e] : half_bits(0);
  }
  __device__ __forceinline__ uint4 packed() const {
    return {q[0] | unsigned(q[1]) << 16, q[2] | unsigned(q[3]) << 16, q[4] | unsigned(q[5]) << 16, q[6] | unsigned(q[7]) << 16};
  }
};
