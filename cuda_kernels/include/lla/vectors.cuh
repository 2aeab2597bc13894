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
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
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

struct Product {
  float y;                 // of the lane's row
  float curvature = 0.0f;  // what the lane has of the vector times the product, of the warp's rows
};

// The moments of 64 keys' channels, or fewer, from row `first` on, times a vector. Sums that do not wait for one another hide each
// other's latency.
template <bool WITH_CURVATURE>
__device__ __forceinline__ Product multiply(LyingVector& vector, const float* moments, int thread, int first = 0) {
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
  Product product;
  const int upper = first + upper_row(thread);
  float of_upper = sums[0][0] + sums[0][1], of_lower = sums[1][0] + sums[1][1];
  if constexpr (WITH_CURVATURE) product.curvature = entry_of_row(vector, upper) * of_upper + entry_of_row(vector, upper + 8) * of_lower;
  if constexpr (PAIRED) {
    const float upper_of_other = sums[2][0] + sums[2][1], lower_of_other = sums[3][0] + sums[3][1];
    if constexpr (WITH_CURVATURE)
      product.curvature += entry_of_row(vector, upper ^ 1) * upper_of_other + entry_of_row(vector, (upper ^ 1) + 8) * lower_of_other;
    of_upper += __shfl_xor_sync(~0u, upper_of_other, PAIRED_LANE);
    of_lower += __shfl_xor_sync(~0u, lower_of_other, PAIRED_LANE);
  }
  const bool second = thread % 2;
  const float y = (second ? of_lower : of_upper) + __shfl_xor_sync(~0u, second ? of_upper : of_lower, 1);
  product.y = y + __shfl_xor_sync(~0u, y, 2);
  return product;
}
