#pragma once
// A row's ridge system by conjugate gradients of all blocks that share it, each with the moments of its own keys.

#include "lla/conjugate.cuh"
#include "lla/passes.cuh"
#include "lla/steps_together.cuh"

// What the steps of all blocks begin with, from the means and weights of their keys; by the transform warps, which have the time: two
// threads for every column, each with half of the blocks. A block's distance from the mean is a sum of differences, not a difference
// of sums: where one block has all but a millionth of the weight, its own is far smaller than what rounds the mean, and what all
// blocks give to the output is to add up.
__device__ __forceinline__ void share_sums(Shared& shared, const Exchange& exchange) {
  const int thread = thread_index() - MATRIX_THREADS, lane = thread % 32, half = thread / D, column = thread % D;
  static_assert(TRANSFORM_THREADS == 2 * D);
  const float shift = shared.sums[column] * inverse_weight(shared.own.d1), mean = shared.origin[column] + shift;
  if (half == 0) exchange.send(0, column, mean);
  if (half == 1 && column < 2) exchange.send(0, D + column, column == 0 ? shared.own.d1 : shared.own.m);
  // A lane has a block's weight. It is asked for with the means: an answer is waited for as long as many.
  float found[2 + HALF];
  exchange.receive(0, found, [&](int i) {
    const int block = i < 2 ? lane : half * HALF + i - 2;
    return block < exchange.blocks ? exchange.place(0, block, i < 2 ? D + i : column) : nullptr;
  });
  const float m_here = lane < exchange.blocks ? found[1] : minus_infinity();
  const float m = largest_of_lanes({m_here, m_here});
  const float weight = lane < exchange.blocks ? rescaling(m_here, m) * found[0] : 0.0f;
  float d1 = 0.0f, sum = 0.0f, distance = 0.0f;
#pragma unroll
  for (int b = 0; b < HALF; b++) {
    const float of_block = __shfl_sync(~0u, weight, half * HALF + b);
    d1 += of_block, sum += of_block * found[2 + b], distance += of_block * (mean - found[2 + b]);
  }
  if constexpr (SENT_AHEAD) wait_for_products(shared);
  // In place of what is read no more.
  float(&of_half)[2 * D] = shared.moved[0].shift;
  float& d1_of_half = shared.warp_d1[0][0];
  if (half == 1) of_half[column] = sum, of_half[D + column] = distance;
  if (half == 1 && column == 0) d1_of_half = d1;
  if constexpr (ADDED_UP) shared.solving.added[half][column] = 0;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  if (half == 0) {
    const float inverse_d1 = reciprocal_fast(d1 + d1_of_half);
    entry_of_row(shared.solving.right, column) = query_at(shared, column) - inverse_d1 * (sum + of_half[column]);
    entry_of_row(shared.solving.apart, column) = inverse_d1 * (distance + of_half[D + column]);
    entry_of_row(shared.solving.shift, column) = shift;
    if (thread == exchange.split) shared.solving.share = inverse_d1 * weight, shared.solving.inverse_weight = inverse_d1 * rescaling(m_here, m);
  }
}

// Clears the places of the next launch; by the transform warps of one block, as that launch is not there yet, and the last one no more.
__device__ __forceinline__ void clear_next(const Exchange& exchange) {
  auto& places = places_of(exchange, true);
#pragma unroll
  for (int i = thread_index() - MATRIX_THREADS; i < int(sizeof places / sizeof places[0][0]); i += TRANSFORM_THREADS) store_relaxed(&places[0][0] + i, 0ull);
}

// What makes a lane's row of a product with the block's moments one with its part of the moments of all keys: the block's share
// of their weight, and how far its mean is from theirs.
struct Completion {
  float share, apart_of_row;
  Entries apart;

  __device__ __forceinline__ Completion(Shared& shared, int thread)
      : share(shared.solving.share), apart_of_row(share * entry_of_row(shared.solving.apart, row_of_product(thread))),
        apart(entries_of_lane(shared.solving.apart, thread % 32)) {}
  // of_apart: the vector's inner product with `apart`.
  __device__ __forceinline__ float operator()(float y, float of_apart) const { return share * y + apart_of_row * of_apart; }
  __device__ __forceinline__ float operator()(float y, const Entries& x) const { return (*this)(y, inner_product(x, apart)); }
};

// What comes when a row ends: the lane's row of the slope's product and, in the first block, what half of the blocks have of a column
// of the output.
struct Received {
  float row = 0.0f, output = 0.0f;

  __device__ __forceinline__ Received(const Exchange& exchange, int thread, int number) {
#pragma unroll
    for (int from = 0; from < HALF; from += AT_ONCE) {
      float x[2 * AT_ONCE];
      exchange.receive(number, x, [&](int i) {
        const bool is_row = i < AT_ONCE;
        const int block = (is_row ? thread % 4 / 2 : thread / D) * HALF + from + i % AT_ONCE;
        const bool is_sent = block < exchange.blocks && (is_row || exchange.split == 0);
        return is_sent ? exchange.place(number, block, is_row ? D + row_of_product(thread) : 2 * D + thread % D) : nullptr;
      });
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++) row += x[b], output += x[AT_ONCE + b];
    }
    row += __shfl_xor_sync(~0u, row, 2);
  }
};

// By the matrix warps, whose accumulators are c: whether the row was solved, and its output written.
__device__ __forceinline__ bool solve_together(Shared& shared, const lla::Call& call, float ridge, const Exchange& exchange, float (&c)[D]) {
  const int thread = thread_index(), lane = thread % 32;
  LyingVector& vector = shared.solving.vectors[thread / 32];
  IterateTogether at(right_side(shared, lane), ridge);
#pragma unroll 1
  for (int number = 1;; number++) {  // of the exchange
    const Completion complete(shared, thread);
    bool sent = false;
    if (!take_steps_together(shared, exchange, c + D / 2, complete, ridge, thread, at, number, sent) || number > MOST_STEPS + 1) return false;
    const Entries x = at.x, last = at.r;
    const int column = thread_index() % D;  // anew: kept over the steps it would cost a register

    const Centring centre(shared);
    const Entries shift = entries_of_lane(shared.solving.shift, lane);
    __syncwarp();
    entries_of_lane(vector, lane) = x;
    __syncwarp();
    // Of values' moments about the mean: of all rows one number is taken off, times the column's sum.
    const float of_shift = inner_product(x, shift), of_apart = inner_product(x, complete.apart);
    const Rows rows = multiply_rows_of_warp<false>(vector, c + D / 2, thread);
    multiply_values(shared, c, thread, entry_of_row(vector, upper_row(thread)), entry_of_row(vector, upper_row(thread) + 8));
    static_assert(MATRIX_THREADS == 2 * D);
    // In the exchange of this step, whose product is not received.
    send_row(exchange, thread, number, D, complete(rows.of[0], of_apart));
    meet_matrix_warps();
    // Distances from the mean of all, by weight, add up to nothing: so that of the values need not be known.
    if (thread < D) {
      const float sum = sum_of_values(shared, centre, column, of_shift) + centre.d1 * (1.0f + of_apart) * shared.own.mean[D + column];
      exchange.send(number, 2 * D + column, shared.solving.inverse_weight * sum);
    }
    const Received received(exchange, thread, number);
    shared.output[MATRIX_WARPS + thread / D][column] = received.output;
    const Entries product = gather_rows(shared, thread, number, received.row);
    const Entries residual = residual_of(right_side(shared, lane), ridge, x, product);
    if (is_near(at, residual, last, ridge)) {
      if (thread >= D || exchange.split != 0) return true;
      const float o = shared.output[MATRIX_WARPS][column] + shared.output[MATRIX_WARPS + 1][column];
      output_of_block(shared, call)[column] = narrow<BFLOAT>(o);
      return true;
    }
    // No place may keep what is not known to have been there.
    if (ADDED_UP && sent) AddedRow(shared, exchange, thread, number).receive(thread, Unit());
    at.begin_anew(residual, ridge);
  }
}
