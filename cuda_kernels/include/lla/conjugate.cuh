#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, for conjugate gradients on the moments where they accumulated: in the
// registers of the matrix warps, each of which has 16 rows of the matrix. One block takes the steps (conjugate_alone.cuh), or all that share
// the row do (conjugate_together.cuh).
//
// What they find is put into the system once, as in float32 the residual of the recurrences may drift from the true one. Where many steps
// do not suffice, or the residual is not what it should be, the system is left to the factorisation.

#include "lla/moments.cuh"
#include "lla/shape.cuh"
#include "lla/steps.cuh"

// Whether blocks that share a row's steps send their means before the last products are done: with heads of 64 what they ask for comes in
// the way of another block of the multiprocessor (measured on an H200).
constexpr bool SENT_AHEAD = TOGETHER && BLOCKS_PER_MULTIPROCESSOR == 1;

// What makes a block's moments about its origin those about the mean of its keys.
struct Centring {
  float d1, inverse_d1, factor;

  __device__ __forceinline__ explicit Centring(const Shared& shared) : d1(shared.own.d1), inverse_d1(inverse_weight(d1)) {
#if ROWS_IN_TURN
    factor = shared.solving.factor;
#else
    factor = shared.inverse_scale[0] * shared.inverse_scale[1];
#endif
  }
};

// The keys' moments about the mean of the block's keys, divided by their weight, in place; with heads of 128 the first warpgroup is
// given the columns that it lacks. What other blocks send is not needed for that, and comes meanwhile.
template <bool IS_FIRST>
__device__ __forceinline__ void complete_moments(Shared& shared, float (&c)[D], int thread) {
  const float inverse_d1 = inverse_weight(shared.own.d1), inverse_scale = shared.inverse_scale[0];
  centre_moments<0, 64>({c + D / 2}, shared.sums, inverse_d1, inverse_scale, thread);
  if constexpr (D == 128) {
    const int upper = upper_row(thread), column = thread % 4 * 2;
    if constexpr (!IS_FIRST) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float* pair = c + D / 2 + 4 * j;
#pragma unroll
        for (int h = 0; h < 2; h++)
          *reinterpret_cast<float2*>(&shared.below[upper - 64 + 8 * h][8 * j + column]) = {pair[2 * h], pair[2 * h + 1]};
      }
      come(shared.given);
      // Those are waited for, these not.
      centre_moments<64, D>({c + D / 2}, shared.sums, inverse_d1, inverse_scale, thread);
    } else {
#if ROWS_IN_TURN
      mbarrier_wait(shared_address(&shared.given), shared.turn & 1);
#else
      mbarrier_wait(shared_address(&shared.given), 0);
#endif
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          c[D / 2 + 4 * (j + 8) + e] = shared.below[8 * j + column + e % 2][upper + 8 * (e / 2)];
    }
  }
  pair_lanes(c + D / 2, thread % 32, false);
}

// Adds to HALF of the lane's sums those of the lane BIT away, which has the other half; returns where they began.
template <int HALF, int BIT>
__device__ __forceinline__ int halve(float (&sums)[D / 4], int lane) {
  const bool later = lane & BIT;
#pragma unroll
  for (int e = 0; e < HALF; e++) {
    const float give = later ? sums[e] : sums[e + HALF], keep = later ? sums[e + HALF] : sums[e];
    sums[e] = keep + __shfl_xor_sync(~0u, give, BIT);
  }
  return later ? HALF : 0;
}

// What a warp gives to the output. Where rows are taken in turn, transform warps have something else in shared.output: there it takes the
// place of the warp's vector.
__device__ __forceinline__ float* output_of_warp(Shared& shared, int warp) {
#if ROWS_IN_TURN
  static_assert(sizeof(LyingVector) >= 4 * D);
  return &shared.solving.vectors[warp][0][0];
#else
  return shared.output[warp];
#endif
}

// Leaves the first of the values' moments in shared memory, and the others in c.
__device__ __forceinline__ void park(Shared& shared, const float (&accumulators)[D], int thread, float (&c)[D]) {
#pragma unroll
  for (int j = 0; j < PARKED / 4; j++)
    shared.parked[j][thread] = {accumulators[4 * j], accumulators[4 * j + 1], accumulators[4 * j + 2], accumulators[4 * j + 3]};
  // Copies: accumulators that two ways of the program leave in the same registers are waited for by each product.
#pragma unroll
  for (int e = PARKED; e < D; e++) c[e] = copy_opaque(accumulators[e]);
}

// Four of the thread's accumulators of the values' moments.
__device__ __forceinline__ float4 values_at(const Shared& shared, const float* c, int thread, int j) {
  return j < PARKED / 4 ? shared.parked[j < PARKED / 4 ? j : 0][thread] : float4{c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
}

// What this warp's rows of the values' moments, as they are, give to the output at a slope of which the lane's two rows are
// given.
__device__ __forceinline__ void multiply_values(Shared& shared, const float* c, int thread, float of_upper, float of_lower) {
  const int lane = thread % 32;
  float sums[D / 4];
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float4 values = values_at(shared, c, thread, j);
    sums[2 * j] = of_upper * values.x + of_lower * values.z;
    sums[2 * j + 1] = of_upper * values.y + of_lower * values.w;
  }
  // Lanes of other rows: a half of the columns each time.
  int first = halve<D / 8, 16>(sums, lane);
  first += halve<D / 16, 8>(sums, lane);
  first += halve<D / 32, 4>(sums, lane);
  if constexpr (IN_TURN) __syncwarp();
#pragma unroll
  for (int e = 0; e < D / 32; e++)
    output_of_warp(shared, thread / 32)[(first + e) / 2 * 8 + lane % 4 * 2 + e % 2] = sums[e];
}

// Of the block's keys or values.
__device__ __forceinline__ float mean_of(const Shared& shared, int column) {
  return shared.origin[column] + shared.sums[column] * inverse_weight(shared.own.d1);
}

// The row that a block has to itself or shares, if it does not take rows in turn.
__device__ __forceinline__ lla::RowIndex row_of_block(const lla::Call& call) { return lla::RowIndex(call, item_of_block(call)); }

// Of the row that the matrix warps solve.
__device__ __forceinline__ half_bits* output_of_block(const Shared& shared, const lla::Call& call) {
#if ROWS_IN_TURN
  return shared.solving.output;
#else
  return output_of(call, row_of_block(call));
#endif
}

// What the warps' rows of the values' moments gave to an output, in a column.
__device__ __forceinline__ float sum_of_outputs(Shared& shared, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < MATRIX_WARPS; w++) sum += output_of_warp(shared, w)[column];
  return sum;
}

// The same of values about their mean; of_shift: the slope's inner product with the shift.
__device__ __forceinline__ float sum_of_values(Shared& shared, const Centring& centre, int column, float of_shift) {
  return centre.factor * sum_of_outputs(shared, column) - of_shift * shared.sums[D + column];
}

// Moments to where they are factored, with the ridge; by the matrix warps. value_means: what is taken off the values' moments of the lane's
// rows, times their columns' sums.
__device__ __forceinline__ void leave_moments(Shared& shared, const float (&c)[D], float key_factor, float ridge, float value_factor, const float (&value_means)[2]) {
  const int thread = thread_index(), upper = upper_row(thread);
  // What lies there has been read.
  meet_matrix_warps();
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const int column = 8 * j + thread % 4 * 2;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[D + column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = upper + 8 * h;
      const float *keys = c + D / 2 + 4 * j + 2 * h, *values = c + 4 * j + 2 * h;
      float2 of_keys = {key_factor * keys[0], key_factor * keys[1]};
      if (row == column) of_keys.x += ridge;
      if (row == column + 1) of_keys.y += ridge;
      *reinterpret_cast<float2*>(&shared.moments[row][column]) = of_keys;
      *reinterpret_cast<float2*>(&shared.moments[row][D + column]) = {value_factor * values[0] - value_means[h] * sums.x,
                                                                      value_factor * values[1] - value_means[h] * sums.y};
    }
  }
}

// After steps that did not solve the row: of a whole one, or to be merged with the moments of other blocks.
__device__ __forceinline__ void leave_to_factorisation(Shared& shared, float (&c)[D], bool whole, float ridge) {
  const int thread = thread_index(), upper = upper_row(thread);
  pair_lanes(c + D / 2, thread % 32, true);
  const Centring centre(shared);
  const float weight = whole ? centre.inverse_d1 : 1.0f, mean = weight * centre.inverse_d1;
#pragma unroll
  for (int j = 0; j < PARKED / 4; j++) {
    const float4 values = values_at(shared, c, thread, j);
    c[4 * j] = values.x, c[4 * j + 1] = values.y, c[4 * j + 2] = values.z, c[4 * j + 3] = values.w;
  }
  leave_moments(shared, c, whole ? 1.0f : centre.d1, whole ? ridge : 0.0f, weight * centre.factor, {mean * shared.sums[upper], mean * shared.sums[upper + 8]});
}
