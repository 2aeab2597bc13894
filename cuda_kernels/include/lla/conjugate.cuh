#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by conjugate gradients on the moments where they accumulated:
// in the registers of the matrix warps, each of which has 16 rows of the matrix.
//
// In the form of Chronopoulos and Gear (J. Comput. Appl. Math. 25, 1989), whose two sums of a step are one. It ends where
// the error is known to be small: the Gauss-Radau quadrature of Meurant and Tichy (Numer. Algorithms 62, 2013), with the
// ridge below all eigenvalues, bounds the error's energy norm. By the inequality of Cauchy and Schwarz that bounds
// the error of every channel of the output, in standard deviations of the values. What was found is then put into the
// system once, as in float32 the residual of the recurrences may drift from the true one. Where many steps do not suffice, or
// the residual is not what it should be, the system is left to the factorisation.

#include "lla/mail.cuh"
#include "lla/moments.cuh"
#include "lla/shape.cuh"

static_assert(MOST_STEPS + 1 < MOST_EXCHANGES, "each has an exchange, after that of the sums");
// Of what the slope adds to an output: a quarter of its last bit in bfloat16, and that bit in float16.
constexpr float TOLERANCE = BFLOAT ? 1.0f / 2048 : 1.0f / 4096;

// The numbers of a step that are the same in all threads.
struct Progress {
  float gamma = 0.0f, inverse_gamma = 0.0f;  // the residual's square
  float curvature = 0.0f, alpha = 0.0f, beta = 0.0f;
  float radau;  // the bound of the squared error over the residual's square
  // Of the slope u and the direction p: u (C_kk + ridge I) u, u u, u p and p p.
  float energy = 0.0f, slope_square = 0.0f, slope_direction = 0.0f, direction_square = 0.0f;

  __device__ __forceinline__ explicit Progress(float ridge) : radau(reciprocal_fast(ridge)) {}

  __device__ __forceinline__ void look(float square, float ridge) {
    gamma = square;
    beta = __fmul_rn(gamma, inverse_gamma);
    const float left = __fsub_rn(radau, alpha);
    // Rounding may leave nothing of it: the residual's own bound then.
    const bool is_left = left > 0.0f;
    radau = __fmul_rn(is_left ? left : 1.0f, reciprocal_fast(is_left ? __fmaf_rn(ridge, left, beta) : ridge));
  }

  // Whether a squared residual makes no error of more than `tolerance` times what the slope adds to the output.
  __device__ __forceinline__ bool is_small(float square, float ridge, float tolerance) const {
    return __fmul_rn(radau, square) <= __fmul_rn(tolerance * tolerance, __fmaf_rn(-ridge, slope_square, energy));
  }

  __device__ __forceinline__ void advance(float delta) {
    const float beta_square = __fmul_rn(beta, beta);
    curvature = __fmaf_rn(-beta_square, curvature, delta);
    alpha = __fmul_rn(gamma, reciprocal_fast(curvature));
    inverse_gamma = reciprocal_fast(gamma);
    energy = __fmaf_rn(alpha, gamma, energy);
    // Residuals are orthogonal to the slope and to the directions before.
    direction_square = __fmaf_rn(beta_square, direction_square, gamma);
    slope_direction = __fmul_rn(beta, slope_direction);
    const float moved = __fmul_rn(alpha, direction_square);
    slope_square = __fmaf_rn(alpha, __fmaf_rn(2.0f, slope_direction, moved), slope_square);
    slope_direction = __fadd_rn(slope_direction, moved);
  }
};

__device__ __forceinline__ void meet_matrix_warps() { barrier_sync(MATRIX, MATRIX_THREADS); }

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
__device__ __forceinline__ void pair_lanes(float (&c)[D], int lane, bool back) {
  if constexpr (PAIRED) {
    const bool second = lane & PAIRED_LANE;
    float* keys = c + D / 2;
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
  float curvature = 0.0f;  // the vector times the product, of the warp's rows
};

// The keys' moments times a vector. Sums that do not wait for one another hide each other's latency.
template <bool WITH_CURVATURE>
__device__ __forceinline__ Product multiply(LyingVector& vector, const float (&c)[D], int thread) {
  constexpr int ROWS = PAIRED ? 4 : 2;
  const float4* quads = reinterpret_cast<const float4*>(vector[thread % VECTOR_RUNS]);
  float sums[ROWS][2] = {};
#pragma unroll
  for (int quad = 0; quad < 4; quad++) {
    const float4 x = quads[quad];
#pragma unroll
    for (int pair = 0; pair < ROWS; pair += 2) {
      const float* keys = c + D / 2 + 16 * pair + 8 * quad;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sums[pair + h][0] += keys[2 * h] * x.x, sums[pair + h][1] += keys[2 * h + 1] * x.y;
        sums[pair + h][0] += keys[4 + 2 * h] * x.z, sums[pair + h][1] += keys[4 + 2 * h + 1] * x.w;
      }
    }
  }
  Product product;
  const int upper = upper_row(thread);
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
  if constexpr (WITH_CURVATURE) product.curvature = sum_of_lanes(product.curvature);
  return product;
}

// Where the blocks of a row share it, how far a block's mean is from that of all keys; in place of what is read no more.
__device__ __forceinline__ float (&apart(Shared& shared))[2 * D] { return shared.moved[0].shift; }

// The sums of the row from those of its blocks; by the transform warps, a thread for every column, whose mean is `mean`.
__device__ __forceinline__ void share_sums(Shared& shared, const Exchange& exchange, int column, float mean) {
  exchange.send(0, column, mean);
  if (column < 2) exchange.send(0, 2 * D + column, column == 0 ? shared.own.d1 : shared.own.m);
  // A lane has a block's weight.
  const int lane = thread_index() % 32;
  float d1_of_block[1], m_of_block[1];
  exchange.receive(0, lane, 2 * D, d1_of_block);
  exchange.receive(0, lane, 2 * D + 1, m_of_block);
  const float m_here = lane < exchange.blocks ? m_of_block[0] : minus_infinity();
  float m = m_here;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lanes));
  const float weight = lane < exchange.blocks ? rescaling(m_here, m) * d1_of_block[0] : 0.0f;
  float d1 = 0.0f, sum = 0.0f;
  constexpr int AT_ONCE = SHARERS < 8 ? SHARERS : 8;
#pragma unroll
  for (int first = 0; first < SHARERS; first += AT_ONCE) {
    float means[AT_ONCE];
    exchange.receive(0, first, column, means);
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) {
      const float of_block = __shfl_sync(~0u, weight, first + b);
      d1 += of_block, sum += of_block * means[b];
    }
  }
  // All blocks have cleared the place of what comes next.
  if constexpr (IN_CLUSTER) acquire_from_cluster();
  const float of_all = sum / d1;
  shared.total.mean[column] = of_all;
  apart(shared)[column] = mean - of_all;
  if (column == 0) shared.total.d1 = d1, shared.total.m = m;
}

// What makes a block's moments about its origin those about the mean of all keys of the row, relative to the row's maximum.
struct Centring {
  float inverse_d1, factor, weight, d1;  // d1: of the block

  __device__ __forceinline__ Centring(const Shared& shared, float factor) : factor(factor) {
    d1 = shared.own.d1;
    inverse_d1 = inverse_weight(d1);
    weight = TOGETHER ? rescaling(shared.own.m, shared.total.m) : 1.0f;
  }

  // One over the weight of all keys of the row.
  __device__ __forceinline__ float inverse_of_all(const Shared& shared) const {
    return TOGETHER ? inverse_weight(shared.total.d1) : inverse_d1;
  }
};

// Of a row of moments: what makes them centred, times a number.
struct RowOfLane {
  float factor, mean, apart = 0.0f;

  __device__ __forceinline__ RowOfLane(Shared& shared, const Centring& centre, int row, float times) {
    if constexpr (TOGETHER) times *= centre.weight;
    factor = times * centre.factor;
    mean = times * (shared.sums[row] * centre.inverse_d1);
    if constexpr (TOGETHER) apart = times * centre.d1 * ::apart(shared)[row];
  }

  // Of the moments in a column: that, the block's sum there, and how far the block's mean is from that of all keys.
  __device__ __forceinline__ float operator()(float moment, float sum, float column_apart) const {
    const float centred = factor * moment - mean * sum;
    return TOGETHER ? centred + apart * column_apart : centred;
  }
};

// The keys' moments about the mean and divided by their weight, in place; with heads of 128 the first warpgroup is given
// the columns that it lacks.
__device__ __forceinline__ void complete_moments(Shared& shared, float (&c)[D], int thread) {
  const int upper = upper_row(thread), column = thread % 4 * 2;
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[0]);
  const RowOfLane rows[2] = {{shared, centre, upper, centre.inverse_of_all(shared)}, {shared, centre, upper + 8, centre.inverse_of_all(shared)}};
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    if (D == 128 && j == D / 16 && thread < 128) break;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[8 * j + column]);
    const float2 columns_apart = *reinterpret_cast<const float2*>(&apart(shared)[8 * j + column]);
    float* pair = c + D / 2 + 4 * j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      pair[2 * h] = rows[h](pair[2 * h], sums.x, columns_apart.x);
      pair[2 * h + 1] = rows[h](pair[2 * h + 1], sums.y, columns_apart.y);
    }
  }
  if constexpr (D == 128) {
    if (thread >= 128) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float* pair = c + D / 2 + 4 * j;
#pragma unroll
        for (int h = 0; h < 2; h++)
          *reinterpret_cast<float2*>(&shared.below[upper - 64 + 8 * h][8 * j + column]) = {pair[2 * h], pair[2 * h + 1]};
      }
    }
    meet_matrix_warps();
    if (thread < 128) {
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          c[D / 2 + 4 * (j + 8) + e] = shared.below[8 * j + column + e % 2][upper + 8 * (e / 2)];
    }
  }
  pair_lanes(c, thread % 32, false);
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

// What this warp's rows of the values' moments, as they are, give to the output at a slope of which the lane's two rows are
// given; to a row of shared.output.
__device__ __forceinline__ void multiply_values(Shared& shared, const float (&c)[D], int thread, float of_upper, float of_lower) {
  const int lane = thread % 32;
  float sums[D / 4];
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    sums[2 * j] = of_upper * c[4 * j] + of_lower * c[4 * j + 2];
    sums[2 * j + 1] = of_upper * c[4 * j + 1] + of_lower * c[4 * j + 3];
  }
  // Lanes of other rows: a half of the columns each time.
  int first = halve<D / 8, 16>(sums, lane);
  first += halve<D / 16, 8>(sums, lane);
  first += halve<D / 32, 4>(sums, lane);
#pragma unroll
  for (int e = 0; e < D / 32; e++)
    shared.output[thread / 32][(first + e) / 2 * 8 + lane % 4 * 2 + e % 2] = sums[e];
}

// Of keys or values, as far as they are there for all matrix warps.
__device__ __forceinline__ float mean_of(const Shared& shared, int column) {
  return TOGETHER ? shared.total.mean[column] : shared.origin[column] + shared.sums[column] * inverse_weight(shared.own.d1);
}

// The lane's entries of the right-hand side.
__device__ __forceinline__ Entries right_side(const Shared& shared, int lane) {
  Entries x;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) {
    const int column = column_of_entry(lane, e);
    const float q = widen<BFLOAT>(reinterpret_cast<const half_bits*>(shared.query[column / 64])[column % 64]);
    x.of[e] = q - mean_of(shared, column);
  }
  return x;
}

// A lane's row of a product, of the moments of all blocks, from word `first` of an exchange on. The lanes that share the row
// each add up half of the blocks.
__device__ __forceinline__ void send_row(const Exchange& exchange, int thread, int number, int first, float y) {
  if (thread % 4 < 2) exchange.send(number, first + row_of_product(thread), y);
}

__device__ __forceinline__ float receive_row(const Exchange& exchange, int thread, int number, int first) {
  constexpr int HALF = TOGETHER ? SHARERS / 2 : 1, AT_ONCE = HALF > 4 && D == 64 ? 4 : HALF;  // for want of registers
  float y = 0.0f;
#pragma unroll
  for (int from = 0; from < HALF; from += AT_ONCE) {
    float x[AT_ONCE];
    exchange.receive(number, thread % 4 / 2 * HALF + from, first + row_of_product(thread), x);
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) y += x[b];
  }
  return y + __shfl_xor_sync(~0u, y, 2);
}

// The lane's entries of a product whose rows all warps have, and all blocks sent. What is in shared memory is read until
// the exchange after next. Waits for all warps: of a cluster's mail each has all by itself.
__device__ __forceinline__ Entries exchange_rows(Shared& shared, const Exchange& exchange, int thread, int number, int first, float y) {
  const int lane = thread % 32;
  if constexpr (IN_CLUSTER) {
    Entries sum;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) sum.of[e] = exchange.receive_sum(number, first + column_of_entry(lane, e));
    return sum;
  } else {
    if constexpr (TOGETHER) y = receive_row(exchange, thread, number, first);
    LyingVector& product = shared.product[number % 2];
    if (thread % 4 < 2) entry_of_row(product, row_of_product(thread)) = y;
    meet_matrix_warps();
    return entries_of_lane(product, lane);
  }
}

// The same, and the inner product with the vector x that was multiplied.
__device__ __forceinline__ Entries exchange_product(Shared& shared, const Exchange& exchange, int thread, int number, const Product& product, const Entries& x, float& curvature) {
  if constexpr (TOGETHER) {
    const Entries rows = exchange_rows(shared, exchange, thread, number, 0, product.y);
    curvature = inner_product(x, rows);
    return rows;
  } else {
    float(&of_warps)[MATRIX_WARPS] = shared.curvatures[number % 2];
    if (thread % 32 == 0) of_warps[thread / 32] = product.curvature;
    const Entries rows = exchange_rows(shared, exchange, thread, number, 0, product.y);
    float sums[4];
#pragma unroll
    for (int w = 0; w < MATRIX_WARPS; w++) sums[w % 4] = w < 4 ? of_warps[w] : sums[w % 4] + of_warps[w];
    curvature = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return rows;
  }
}

// By the matrix warps, whose accumulators are c: whether the row was solved, and its output written.
__device__ __forceinline__ bool solve_by_steps(Shared& shared, const lla::Call& call, const lla::RowIndex& row, float (&c)[D]) {
  const int thread = thread_index(), lane = thread % 32;
  LyingVector& vector = shared.vectors[thread / 32];
  const float ridge = row.ridge(call);
  const Exchange exchange(shared, call);
  complete_moments(shared, c, thread);

  Entries r = right_side(shared, lane), x = {}, p = {}, s = {};
  Progress progress(ridge);
  bool small;
  int number = 1;  // of the exchange
  float y;
#pragma unroll 1
  while (true) {
    entries_of_lane(vector, lane) = r;
    __syncwarp();
    const Product product = multiply<!TOGETHER>(vector, c, thread);
    y = product.y;
    if constexpr (TOGETHER) send_row(exchange, thread, number, 0, y);
    // Beside the product, whose latency hides it.
    progress.look(inner_product(r, r), ridge);
    // The same in all lanes, as the compiler sees by this.
    small = __any_sync(~0u, progress.is_small(progress.gamma, ridge, TOLERANCE));
    if (small || __any_sync(~0u, !(progress.gamma < -minus_infinity())) || number > MOST_STEPS) break;
    float curvature;
    Entries w = exchange_product(shared, exchange, thread, number, product, r, curvature);
    progress.advance(__fmaf_rn(ridge, progress.gamma, curvature));
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
      w.of[e] = __fmaf_rn(ridge, r.of[e], w.of[e]);
      s.of[e] = __fmaf_rn(progress.beta, s.of[e], w.of[e]);
      p.of[e] = __fmaf_rn(progress.beta, p.of[e], r.of[e]);
      x.of[e] = __fmaf_rn(progress.alpha, p.of[e], x.of[e]);
      r.of[e] = __fmaf_rn(-progress.alpha, s.of[e], r.of[e]);
    }
    // Of what lies in shared memory all lanes have read what they need: the barrier is after that, but a cluster has none.
    if constexpr (IN_CLUSTER) __syncwarp();
    number++;
  }
  // No block may leave before all that is sent to it has come.
  if constexpr (IN_CLUSTER) exchange_rows(shared, exchange, thread, number, 0, y);
  if (!small) return false;

  __syncwarp();
  entries_of_lane(vector, lane) = x;
  __syncwarp();
  y = multiply<false>(vector, c, thread).y;
  // Beside what was sent in this step and is not received.
  if constexpr (TOGETHER) send_row(exchange, thread, number, D, y);
  multiply_values(shared, c, thread, entry_of_row(vector, upper_row(thread)), entry_of_row(vector, upper_row(thread) + 8));
  // Of values' moments about the mean: of all rows one number is taken off, times the column's sum.
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[1]);
  Entries mean, from_mean;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) {
    const int column = column_of_entry(lane, e);
    mean.of[e] = shared.sums[column] * centre.inverse_d1, from_mean.of[e] = apart(shared)[column];
  }
  const float of_means = inner_product(x, mean), of_distances = TOGETHER ? inner_product(x, from_mean) : 0.0f;
  const auto sum_of_values = [&] {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < MATRIX_WARPS; w++) sum += shared.output[w][thread];
    sum = centre.factor * sum - of_means * shared.sums[D + thread];
    return TOGETHER ? centre.weight * (sum + centre.d1 * of_distances * apart(shared)[D + thread]) : sum;
  };
  if constexpr (TOGETHER) {
    meet_matrix_warps();
    if (thread < D) exchange.send<false>(number, 2 * D + thread, sum_of_values());
  }
  const Entries product = exchange_rows(shared, exchange, thread, number, D, y), right = right_side(shared, lane);
  Entries residual;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) residual.of[e] = right.of[e] - __fmaf_rn(ridge, x.of[e], product.of[e]);
  if (!__any_sync(~0u, progress.is_small(inner_product(residual, residual), ridge, 2.0f * TOLERANCE))) return false;
  if (thread < D) {
    const auto write = [&](float sum) {
      output_of(call, row)[thread] = narrow<BFLOAT>(mean_of(shared, D + thread) + centre.inverse_of_all(shared) * sum);
    };
    if constexpr (TOGETHER) {
      if (exchange.split == 0) write(exchange.receive_sum(number, 2 * D + thread));
    } else {
      write(sum_of_values());
    }
  }
  return true;
}

// The moments as they are for the factorisation, of a whole row with the ridge, or to be merged with those of other blocks; by
// the matrix warps, after solve_by_steps.
__device__ __forceinline__ void leave_to_factorisation(Shared& shared, float (&c)[D], bool whole, float ridge) {
  const int thread = thread_index(), upper = upper_row(thread);
  pair_lanes(c, thread % 32, true);
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[1]);
  const float key_factor = whole ? 1.0f : shared.total.d1, value_factor = whole ? centre.inverse_of_all(shared) : 1.0f;
  const RowOfLane rows[2] = {{shared, centre, upper, value_factor}, {shared, centre, upper + 8, value_factor}};
  // What lies where the moments go has been read.
  meet_matrix_warps();
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const int column = 8 * j + thread % 4 * 2;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[D + column]);
    const float2 columns_apart = *reinterpret_cast<const float2*>(&apart(shared)[D + column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = upper + 8 * h;
      float2 keys = {key_factor * c[D / 2 + 4 * j + 2 * h], key_factor * c[D / 2 + 4 * j + 2 * h + 1]};
      if (whole && row == column) keys.x += ridge;
      if (whole && row == column + 1) keys.y += ridge;
      *reinterpret_cast<float2*>(&shared.moments[row][column]) = keys;
      *reinterpret_cast<float2*>(&shared.moments[row][D + column]) = {rows[h](c[4 * j + 2 * h], sums.x, columns_apart.x),
                                                                      rows[h](c[4 * j + 2 * h + 1], sums.y, columns_apart.y)};
    }
  }
  if constexpr (TOGETHER) {
    meet_matrix_warps();
    static_assert(MATRIX_THREADS == 2 * D, "a thread for every column of the sums");
    shared.own.mean[thread] = shared.total.mean[thread];
    if (thread == 0) shared.own.d1 *= centre.weight, shared.own.m = shared.total.m;
  }
}
