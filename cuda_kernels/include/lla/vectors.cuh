#pragma once
// Vectors of D numbers that every warp of a product has, and the product itself of a matrix that lies over the registers of
// these warps as the tensor cores leave it: 16 rows a warp.

#include "lla/accumulators.cuh"
#include "lla/inputs.cuh"
#include "ptx/opaque.cuh"

// In shared memory, in runs of 16. What lanes take at a time falls on different banks.
constexpr int VECTOR_RUNS = D / 16;
using LyingVector = float[VECTOR_RUNS][D == 64 ? 24 : 20];

// Every matrix warp has all of each vector, ENTRIES of a lane, and does the same with it to the same bits. So there is one
// exchange a step, that of the product's rows. In shared memory a vector lies in runs: what a lane multiplies by is in one.
constexpr int ENTRIES = D / 32;
struct alignas(4 * ENTRIES) Entries {
  float of[ENTRIES];
};

__device__ __forceinline__ int column_of_entry(int lane, int e) {
  const int run = lane % VECTOR_RUNS, in_run = lane / VECTOR_RUNS * ENTRIES + e;
  return run / 4 * 64 + in_run / 2 * 8 + run % 4 * 2 + in_run % 2;
}

__device__ __forceinline__ float& entry_of_row(LyingVector& vector, int row) {
  return vector[row / 64 * 4 + row % 8 / 2][row % 64 / 8 * 2 + row % 2];
}

__device__ __forceinline__ Entries& entries_of_lane(LyingVector& vector, int lane) {
  return *reinterpret_cast<Entries*>(&vector[lane % VECTOR_RUNS][lane / VECTOR_RUNS * ENTRIES]);
}

// Of all lanes, in each of them and to the same bits.
constexpr int SUM_EXCHANGES = 5;
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int i = 0; i < SUM_EXCHANGES; i++) x += __shfl_xor_sync(~0u, x, 16 >> i);
  return x;
}

__device__ __forceinline__ float inner_product(const Entries& x, const Entries& y) {
  float sum = __fmul_rn(x.of[0], y.of[0]);
#pragma unroll
  for (int e = 1; e < ENTRIES; e++) sum = __fmaf_rn(x.of[e], y.of[e], sum);
  return sum_of_lanes(sum);
}

// As the tensor cores leave them, a lane has two rows of the matrix, upper_row and that 8 further on, and a quarter of their
// columns. With heads of 128 it gives half of these to the lane with the next row, or the one before, and takes as many of
// that one's: four rows, of whose columns, and so of the vector, it needs an eighth.
constexpr bool PAIRED = D == 128;
constexpr int PAIRED_LANE = 4;

// The keys' moments of two lanes in exchange, the lane's own rows first; forth and back.
__device__ __forceinline__ void pair_lanes(float* keys, int lane, bool back) {
  if constexpr (PAIRED) {
    const bool second = lane & PAIRED_LANE;
#pragma unroll
    for (int e = 0; e < D / 4; e++) {
      if (!back) {
        const float keep = second ? keys[D / 4 + e] : keys[e], give = second ? keys[e] : keys[D / 4 + e];
        keys[e] = keep;
        keys[D / 4 + e] = __shfl_xor_sync(~0u, give, PAIRED_LANE);
      } else {
        const float own = keys[e], other = __shfl_xor_sync(~0u, keys[D / 4 + e], PAIRED_LANE);
        keys[e] = second ? other : own;
        keys[D / 4 + e] = second ? own : other;
      }
    }
  }
}

// Of the product, a lane has the first or the second of its own rows, as does the lane two further on.
__device__ __forceinline__ int row_of_product(int thread) { return upper_row(thread) + 8 * (thread % 2); }

// What a lane has of the products of its rows, upper_row and that 8 further on, and of those of the other lane if they are paired; then,
// from one exchange between lanes to the next, of one row.
constexpr int ROW_EXCHANGES = PAIRED ? 3 : 2;
struct RowSums {
  float upper, lower, upper_of_other, lower_of_other;
  float row;  // after ROW_EXCHANGES

  // The moments of 64 keys' channels, or fewer, times a vector. Sums that do not wait for one another hide each other's latency.
  __device__ __forceinline__ void multiply(const LyingVector& vector, const float* moments, int thread) {
    constexpr int ROWS = PAIRED ? 4 : 2;
    const float4* quads = reinterpret_cast<const float4*>(vector[thread % VECTOR_RUNS]);
    float sums[ROWS][2] = {};
#pragma unroll
    for (int quad = 0; quad < 4; quad++) {
      const float4 x = quads[quad];
#pragma unroll
      for (int pair = 0; pair < ROWS; pair += 2) {
        const float* keys = moments + 16 * pair + 8 * quad;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          sums[pair + h][0] += keys[2 * h] * x.x, sums[pair + h][1] += keys[2 * h + 1] * x.y;
          sums[pair + h][0] += keys[4 + 2 * h] * x.z, sums[pair + h][1] += keys[4 + 2 * h + 1] * x.w;
        }
      }
    }
    upper = sums[0][0] + sums[0][1], lower = sums[1][0] + sums[1][1];
    if constexpr (PAIRED) upper_of_other = sums[2][0] + sums[2][1], lower_of_other = sums[3][0] + sums[3][1];
  }

  // What the lane has of the vector's inner product with the product; before exchanges. first: the first of the rows' block.
  __device__ __forceinline__ float with_vector(LyingVector& vector, int thread, int first) const {
    const int row = first + upper_row(thread);
    float sum = entry_of_row(vector, row) * upper + entry_of_row(vector, row + 8) * lower;
    if constexpr (PAIRED) sum += entry_of_row(vector, row ^ 1) * upper_of_other + entry_of_row(vector, (row ^ 1) + 8) * lower_of_other;
    return sum;
  }

  __device__ __forceinline__ void exchange(int number, int thread) {
    const bool second = thread % 2;
    if (PAIRED && number == 0)
      upper += __shfl_xor_sync(~0u, upper_of_other, PAIRED_LANE), lower += __shfl_xor_sync(~0u, lower_of_other, PAIRED_LANE);
    else if (number == ROW_EXCHANGES - 2)
      row = (second ? lower : upper) + __shfl_xor_sync(~0u, second ? upper : lower, 1);
    else
      row += __shfl_xor_sync(~0u, row, 2);
  }
};
