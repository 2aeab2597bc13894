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

// The numbers of a step that are the same in all threads. Their warps are compiled apart, and must come to the same bits:
// nothing here is left to a compiler's choice of contractions.
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

// Each lane has two rows of the matrix, and of vectors the first or the second of these: as does the lane two further on.
__device__ __forceinline__ int row_of_vectors(int thread) { return upper_row(thread) + 8 * (thread % 2); }

// Of all rows that a warp has of a vector.
__device__ __forceinline__ float sum_of_rows(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// Where the matrix warps wait for one another, at two places of the program: the warpgroups' functions are two. A hardware
// barrier may be, and is a tenth of all the time faster here than one in memory; but compute-sanitizer's synccheck wants one
// place. MEET_IN_MEMORY is for that.
struct MatrixMeeting {
#ifdef MEET_IN_MEMORY
  const Shared& shared;
  unsigned parity = 0;

  __device__ __forceinline__ explicit MatrixMeeting(Shared& shared) : shared(shared) {}
  __device__ __forceinline__ void operator()() { meet(shared.multiplied, parity), parity ^= 1; }
#else
  __device__ __forceinline__ explicit MatrixMeeting(Shared&) {}
  __device__ __forceinline__ void operator()() { barrier_sync(MATRIX, MATRIX_THREADS); }
#endif
};

// Gives all matrix warps a vector to multiply by; before a barrier. A lane takes pairs of neighbouring columns.
__device__ __forceinline__ void publish(Shared& shared, int thread, float x) {
  const int row = row_of_vectors(thread);
  if (thread % 4 < 2) shared.published[row % 8 / 2][row / 8 * 2 + row % 2] = x;
}

// The lane's row of the keys' moments times the vector that was published.
__device__ __forceinline__ float multiply_published(const Shared& shared, const float (&c)[D], int thread) {
  const float4* quads = reinterpret_cast<const float4*>(shared.published[thread % 4]);
  float upper[2] = {}, lower[2] = {};
#pragma unroll
  for (int quad = 0; quad < D / 16; quad++) {
    const float4 x = quads[quad];
    const float* keys = c + D / 2 + 8 * quad;
    upper[0] += keys[0] * x.x, upper[1] += keys[1] * x.y, lower[0] += keys[2] * x.x, lower[1] += keys[3] * x.y;
    upper[0] += keys[4] * x.z, upper[1] += keys[5] * x.w, lower[0] += keys[6] * x.z, lower[1] += keys[7] * x.w;
  }
  const float of_upper = upper[0] + upper[1], of_lower = lower[0] + lower[1];
  const bool second = thread % 2;
  float y = (second ? of_lower : of_upper) + __shfl_xor_sync(~0u, second ? of_upper : of_lower, 1);
  return y + __shfl_xor_sync(~0u, y, 2);
}

// The sum of the squares of the vector that was published.
__device__ __forceinline__ float square_of_published(const Shared& shared, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < D / 32; e++) {
    const float x = shared.published[lane / 8][lane % 8 * (D / 32) + e];
    sum = __fmaf_rn(x, x, sum);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  return sum;
}

// Over all rows, in every thread, of the warp's sums. Ends a step: what was published may be replaced.
__device__ __forceinline__ float sum_of_warps(Shared& shared, MatrixMeeting& meet_others, int thread, float x) {
  if (thread % 32 == 0) shared.dots[thread / 32] = x;
  meet_others();
  float sums[4];
#pragma unroll
  for (int w = 0; w < MATRIX_THREADS / 32; w++) sums[w % 4] = w < 4 ? shared.dots[w] : sums[w % 4] + shared.dots[w];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
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

  // Of a row and a column: a moment, the block's mean less its origin in the row, the block's sum in the column, and how far
  // the block's means are apart.
  __device__ __forceinline__ float operator()(float moment, float mean, float sum, float row_apart, float column_apart) const {
    float centred = factor * moment - mean * sum;
    if constexpr (TOGETHER) centred = weight * (centred + d1 * row_apart * column_apart);
    return centred;
  }
};

// The keys' moments about the mean and divided by their weight, in place; with heads of 128 the first warpgroup is given
// the columns that it lacks.
__device__ __forceinline__ void complete_moments(Shared& shared, MatrixMeeting& meet_others, float (&c)[D], int thread) {
  const int upper = upper_row(thread), column = thread % 4 * 2;
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[0]);
  const float inverse_of_all = centre.inverse_of_all(shared);
  const float mean[2] = {shared.sums[upper] * centre.inverse_d1, shared.sums[upper + 8] * centre.inverse_d1};
  const float rows_apart[2] = {apart(shared)[upper], apart(shared)[upper + 8]};
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    if (D == 128 && j == D / 16 && thread < 128) break;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[8 * j + column]);
    const float2 columns_apart = *reinterpret_cast<const float2*>(&apart(shared)[8 * j + column]);
    float* pair = c + D / 2 + 4 * j;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      pair[2 * h] = inverse_of_all * centre(pair[2 * h], mean[h], sums.x, rows_apart[h], columns_apart.x);
      pair[2 * h + 1] = inverse_of_all * centre(pair[2 * h + 1], mean[h], sums.y, rows_apart[h], columns_apart.y);
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
    meet_others();
    if (thread < 128) {
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          c[D / 2 + 4 * (j + 8) + e] = shared.below[8 * j + column + e % 2][upper + 8 * (e / 2)];
    }
  }
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

// What this warp's rows of the values' moments, about the mean, give to the output at the slope u; to a row of
// shared.output, without the weight that they are divided by.
__device__ __forceinline__ void multiply_values(Shared& shared, const float (&c)[D], int thread, float u) {
  const float other = __shfl_xor_sync(~0u, u, 1);
  const float slope[2] = {thread % 2 ? other : u, thread % 2 ? u : other};
  const int lane = thread % 32, upper = upper_row(thread);
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[1]);
  const float mean[2] = {shared.sums[upper] * centre.inverse_d1, shared.sums[upper + 8] * centre.inverse_d1};
  const float rows_apart[2] = {apart(shared)[upper], apart(shared)[upper + 8]};
  float sums[D / 4];
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const int column = D + 8 * j + lane % 4 * 2;
    const float2 of_values = *reinterpret_cast<const float2*>(&shared.sums[column]);
    const float2 columns_apart = *reinterpret_cast<const float2*>(&apart(shared)[column]);
    sums[2 * j] = sums[2 * j + 1] = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      sums[2 * j] += slope[h] * centre(c[4 * j + 2 * h], mean[h], of_values.x, rows_apart[h], columns_apart.x);
      sums[2 * j + 1] += slope[h] * centre(c[4 * j + 2 * h + 1], mean[h], of_values.y, rows_apart[h], columns_apart.y);
    }
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

// Of vectors, this lane's row of the right-hand side.
__device__ __forceinline__ float right_side(const Shared& shared, int row) {
  const float q = widen<BFLOAT>(reinterpret_cast<const half_bits*>(shared.query[row / 64])[row % 64]);
  return q - mean_of(shared, row);
}

// A lane's row of a product, of the moments of all blocks, from word `first` of an exchange on. The lanes that share the row
// each add up half of the blocks.
__device__ __forceinline__ void send_row(const Exchange& exchange, int thread, int number, int first, float y) {
  if (thread % 4 < 2) exchange.send(number, first + row_of_vectors(thread), y);
}

__device__ __forceinline__ float receive_row(const Exchange& exchange, int thread, int number, int first) {
  constexpr int HALF = TOGETHER ? SHARERS / 2 : 1;
  float x[HALF], y = 0.0f;
  exchange.receive(number, thread % 4 / 2 * HALF, first + row_of_vectors(thread), x);
#pragma unroll
  for (int b = 0; b < HALF; b++) y += x[b];
  return y + __shfl_xor_sync(~0u, y, 2);
}

// By the matrix warps, whose accumulators are c: whether the row was solved, and its output written.
__device__ __forceinline__ bool solve_by_steps(Shared& shared, MatrixMeeting& meet_others, const lla::Call& call, const lla::RowIndex& row, float (&c)[D]) {
  const int thread = thread_index();
  const float ridge = row.ridge(call);
  const Exchange exchange(shared, call);
  complete_moments(shared, meet_others, c, thread);

  float r = right_side(shared, row_of_vectors(thread)), x = 0.0f, p = 0.0f, s = 0.0f;
  Progress progress(ridge);
  bool small = false;
  int step = 0;
#pragma unroll 1
  for (; step < MOST_STEPS; step++) {
    publish(shared, thread, r);
    meet_others();
    float y = multiply_published(shared, c, thread);
    if constexpr (TOGETHER) send_row(exchange, thread, 1 + step, 0, y);
    // Beside the product, whose latency hides it.
    progress.look(square_of_published(shared, thread % 32), ridge);
    small = progress.is_small(progress.gamma, ridge, TOLERANCE);
    if (small || !(progress.gamma < -minus_infinity())) break;
    if constexpr (TOGETHER) y = receive_row(exchange, thread, 1 + step, 0);
    const float w = y + ridge * r;
    progress.advance(sum_of_warps(shared, meet_others, thread, sum_of_rows(r * w)));
    s = w + progress.beta * s;
    p = r + progress.beta * p;
    x += progress.alpha * p;
    r -= progress.alpha * s;
  }
  // No block may leave before all that is sent to it has come.
  if (IN_CLUSTER && step < MOST_STEPS) receive_row(exchange, thread, 1 + step, 0);
  meet_others();
  if (!small) return false;

  publish(shared, thread, x);
  meet_others();
  float y = multiply_published(shared, c, thread);
  // Beside what was sent in this step and is not received.
  if constexpr (TOGETHER) send_row(exchange, thread, 1 + step, D, y);
  multiply_values(shared, c, thread, x);
  const auto sum_of_values = [&] {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < MATRIX_THREADS / 32; w++) sum += shared.output[w][thread];
    return sum;
  };
  if constexpr (TOGETHER) {
    meet_others();
    if (thread < D) exchange.send<false>(1 + step, 2 * D + thread, sum_of_values());
    y = receive_row(exchange, thread, 1 + step, D);
  }
  // Made anew: the registers are full.
  const float residual = right_side(shared, row_of_vectors(thread_index())) - (y + ridge * x);
  const float square = sum_of_warps(shared, meet_others, thread, sum_of_rows(residual * residual));
  if (!progress.is_small(square, ridge, 2.0f * TOLERANCE)) return false;
  if (thread < D) {
    const auto write = [&](float sum) {
      const float inverse_of_all = TOGETHER ? inverse_weight(shared.total.d1) : inverse_weight(shared.own.d1);
      output_of(call, row)[thread] = narrow<BFLOAT>(mean_of(shared, D + thread) + inverse_of_all * sum);
    };
    if constexpr (TOGETHER) {
      if (exchange.split == 0) write(exchange.receive_sum(1 + step, 2 * D + thread));
    } else {
      write(sum_of_values());
    }
  }
  return true;
}

// The moments as they are for the factorisation, of a whole row with the ridge, or to be merged with those of other blocks; by
// the matrix warps, after solve_by_steps.
__device__ __forceinline__ void leave_to_factorisation(Shared& shared, MatrixMeeting& meet_others, const float (&c)[D], bool whole, float ridge) {
  const int thread = thread_index(), upper = upper_row(thread);
  const Centring centre(shared, shared.inverse_scale[0] * shared.inverse_scale[1]);
  const float inverse_of_all = centre.inverse_of_all(shared);
  const float key_factor = whole ? 1.0f : shared.total.d1, value_factor = whole ? inverse_of_all : 1.0f;
  const float mean[2] = {shared.sums[upper] * centre.inverse_d1, shared.sums[upper + 8] * centre.inverse_d1};
  const float rows_apart[2] = {apart(shared)[upper], apart(shared)[upper + 8]};
  // What lies where the moments go has been read.
  meet_others();
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
      *reinterpret_cast<float2*>(&shared.moments[row][D + column]) = {
          value_factor * centre(c[4 * j + 2 * h], mean[h], sums.x, rows_apart[h], columns_apart.x),
          value_factor * centre(c[4 * j + 2 * h + 1], mean[h], sums.y, rows_apart[h], columns_apart.y)};
    }
  }
  if constexpr (TOGETHER) {
    meet_others();
    static_assert(MATRIX_THREADS == 2 * D, "a thread for every column of the sums");
    shared.own.mean[thread] = shared.total.mean[thread];
    if (thread == 0) shared.own.d1 *= centre.weight, shared.own.m = shared.total.m;
  }
}
