#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by conjugate gradients on the moments where they accumulated:
// in the registers of the matrix warps, each of which has 16 rows of the matrix.
//
// What the steps found (steps.cuh) is put into the system once, as in float32 the residual of the recurrences may drift from the
// true one. Where many steps do not suffice, or the residual is not what it should be, the system is left to the factorisation.

#include "lla/moments.cuh"
#include "lla/passes.cuh"
#include "lla/shape.cuh"
#include "lla/steps.cuh"

// Whether blocks that share a row send their means before the last products are done: with heads of 64 what they ask for comes in
// the way of another block of the multiprocessor (measured on an H200).
constexpr bool SENT_AHEAD = TOGETHER && BLOCKS_PER_MULTIPROCESSOR == 1;

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

// What makes a lane's row of a product with the block's moments one with its part of the moments of all keys: the block's share
// of their weight, and how far its mean is from theirs.
struct Completion {
  float share = 1.0f, apart_of_row = 0.0f;
  Entries apart = {};

  __device__ __forceinline__ Completion(Shared& shared, int thread) {
    if constexpr (TOGETHER) {
      share = shared.solving.share, apart_of_row = share * entry_of_row(shared.solving.apart, row_of_product(thread));
      apart = entries_of_lane(shared.solving.apart, thread % 32);
    }
  }
  // of_apart: the vector's inner product with `apart`.
  __device__ __forceinline__ float operator()(float y, float of_apart) const { return TOGETHER ? share * y + apart_of_row * of_apart : y; }
  __device__ __forceinline__ float operator()(float y, const Entries& x) const { return (*this)(y, TOGETHER ? inner_product(x, apart) : 0.0f); }
};

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
__device__ __forceinline__ float* output_of_warp(Shared& shared, int warp) { return IN_TURN ? &shared.solving.vectors[warp][0][0] : shared.output[warp]; }
static_assert(sizeof(LyingVector) >= 4 * D);

// What this warp's rows of the values' moments, as they are, give to the output at a slope of which the lane's two rows are
// given.
__device__ __forceinline__ void multiply_values(Shared& shared, const float* c, int thread, float of_upper, float of_lower) {
  const int lane = thread % 32;
  float sums[D / 4];
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float4 values = j < PARKED / 4 ? shared.parked[IN_TURN ? j : 0][thread] : float4{c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
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

__device__ __forceinline__ Entries right_side(Shared& shared, int lane) {
  if constexpr (TOGETHER || IN_TURN || IS_GATHERED)
    return entries_of_lane(shared.solving.right, lane);
  else
    return right_side_alone(shared, lane);
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

#if GATHERED
// What is known of a row: a slope that was proposed is not near enough; or it is the row's, or there is none.
enum : unsigned { GOES_ON, SOLVED, UNSOLVED };

// Gives the transform warps a slope, whose output they find; or tells them that there is none. By the first matrix warp.
__device__ __forceinline__ void propose(Shared& shared, const Entries& slope, bool is_proposed) {
  const int lane = thread_index() % 32;
  if (thread_index() >= 32) return;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) shared.slope[column_of_entry(lane, e)] = slope.of[e];
  if (lane == 0) shared.is_proposed = is_proposed;
  arrive_as_warp(shared.proposed, lane);
}

// before: slopes that came before the one that is decided on.
__device__ __forceinline__ unsigned parity_of_decision(const Shared& shared, unsigned before) { return shared.exact ^ 1 ^ before & 1; }
// What came of a slope, which both roles know then.
__device__ __forceinline__ void decide(Shared& shared, unsigned what, unsigned before) {
  if (thread_index() == 0) shared.solved_by_steps = what, shared.proposals = before + 1;
  meet(shared.met, parity_of_decision(shared, before));
}
#endif

// By the matrix warps, whose accumulators are c: whether the row was solved, and its output written.
__device__ __forceinline__ bool solve_by_steps(Shared& shared, const lla::Call& call, float ridge, const Exchange& exchange,
                                               float (&c)[D]) {
  const int thread = thread_index(), lane = thread % 32;
  LyingVector& vector = shared.solving.vectors[thread / 32];
  Iterate at(right_side(shared, lane), ridge);
  [[maybe_unused]] unsigned proposals = 0;
#pragma unroll 1
  for (int number = 1;; number++) {  // of the exchange
    const Completion complete(shared, thread);
    bool near, sent = false;
    if constexpr (TOGETHER)
      near = take_steps_together(shared, exchange, c + D / 2, complete, ridge, thread, at, number, sent) && number <= MOST_STEPS + 1;
    else
      near = take_steps_alone(shared, exchange, c + D / 2, ridge, thread, at, number);
#if GATHERED
    if (!near) propose(shared, at.x, false), decide(shared, UNSOLVED, proposals);
#endif
    if (!near) return false;
    const Entries x = at.x, last = at.r;
    const int column = thread_index() % D;  // anew: kept over the steps it would cost a register

    const Centring centre(shared);
    Entries shift;
    if constexpr (TOGETHER || IN_TURN) {
      shift = entries_of_lane(shared.solving.shift, lane);
    } else if constexpr (!IS_GATHERED) {
#pragma unroll
      for (int e = 0; e < ENTRIES; e++) shift.of[e] = shared.sums[column_of_entry(lane, e)] * centre.inverse_d1;
    }
    __syncwarp();
    entries_of_lane(vector, lane) = x;
#if GATHERED
    propose(shared, x, true);
#endif
    __syncwarp();
    // Of values' moments about the mean: of all rows one number is taken off, times the column's sum.
    const float of_shift = IS_GATHERED ? 0.0f : inner_product(x, shift), of_apart = TOGETHER ? inner_product(x, complete.apart) : 0.0f;
    const Rows rows = multiply_rows_of_warp<false>(vector, c + D / 2, thread);
    if constexpr (!IS_GATHERED) multiply_values(shared, c, thread, entry_of_row(vector, upper_row(thread)), entry_of_row(vector, upper_row(thread) + 8));
    Entries product;
    float o;
    if constexpr (!TOGETHER) {
      product = gather_rows(shared, thread, number, rows.of);
      // Beside the residual, which says whether it is the output.
      if constexpr (!IS_GATHERED) o = (IN_TURN ? shared.own.mean[D + column] : mean_of(shared, D + column)) + centre.inverse_d1 * sum_of_values(shared, centre, column, of_shift);
    } else {
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
      product = gather_rows(shared, thread, number, {received.row});
    }
    const Entries residual = residual_of(right_side(shared, lane), ridge, x, product);
    const bool is_solved = is_near(at, residual, last, ridge);
#if GATHERED
    decide(shared, is_solved ? SOLVED : GOES_ON, proposals++);
#endif
    if (is_solved) {
      if (IS_GATHERED) return true;
      if (thread >= D || (TOGETHER && exchange.split != 0)) return true;
      if constexpr (TOGETHER) o = shared.output[MATRIX_WARPS][column] + shared.output[MATRIX_WARPS + 1][column];
      output_of_block(shared, call)[column] = narrow<BFLOAT>(o);
      return true;
    }
    // No place may keep what is not known to have been there.
    if (ADDED_UP && sent) AddedRow(shared, exchange, thread, number).receive(thread, Unit());
    at.begin_anew(residual, ridge);
  }
}

// The moments as they are for the factorisation, of a whole row with the ridge, or to be merged with those of other blocks; by
// the matrix warps, after solve_by_steps.
__device__ __forceinline__ void leave_to_factorisation(Shared& shared, float (&c)[D], bool whole, float ridge) {
  const int thread = thread_index(), upper = upper_row(thread);
  pair_lanes(c + D / 2, thread % 32, true);
  const Centring centre(shared);
  const float key_factor = whole ? 1.0f : centre.d1, value_factor = whole ? centre.inverse_d1 : 1.0f;
  const float mean_factor = IS_GATHERED ? 0.0f : value_factor * centre.inverse_d1, means[2] = {mean_factor * shared.sums[upper], mean_factor * shared.sums[upper + 8]};
#if GATHERED
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float4 values = shared.values[0][j][thread];
    c[4 * j] = values.x, c[4 * j + 1] = values.y, c[4 * j + 2] = values.z, c[4 * j + 3] = values.w;
  }
#endif
  // What lies where the moments go has been read.
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
      if (whole && row == column) of_keys.x += ridge;
      if (whole && row == column + 1) of_keys.y += ridge;
      *reinterpret_cast<float2*>(&shared.moments[row][column]) = of_keys;
      const float factor = IS_GATHERED ? 1.0f : value_factor * centre.factor;
      *reinterpret_cast<float2*>(&shared.moments[row][D + column]) = {factor * values[0] - means[h] * sums.x, factor * values[1] - means[h] * sums.y};
    }
  }
}
