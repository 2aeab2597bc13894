#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by a blocked Cholesky factorisation in shared memory.
//
// The chain of pivots bounds it. Columns are taken 16 at a time, as two panels of 8, by the panel threads, which hold
// one row of the matrix each: every thread factors a panel's diagonal block by itself, in registers, while it solves
// its own row, and takes these columns' part from its row of the next 16. So no pivot waits for another thread, and 16
// columns cost four barriers. The right-hand side is one more row, and 16 rows of the identity give M^T = L^-T of every
// diagonal block of 16.
//
// The other warps update the rest of the trailing matrix meanwhile, by tensor cores, each number as two of tf32, which
// is nearly float32; and they fold M into the columns that are done, W = L M, which turns the back substitution into
// one product a block.

#include "ptx/mma.cuh"
#include "lla/shape.cuh"

constexpr int PANEL = 8;
constexpr int BLOCK = 2 * PANEL;
constexpr int BLOCKS = D / BLOCK;
// The first transform warps: a row of the matrix each, then the rows beside it.
constexpr int PANEL_THREADS = D + 32;
constexpr int UPDATE_WARPS = WARPS - PANEL_THREADS / 32;

// The 8 columns of a panel in one row.
struct PanelRow {
  float x[PANEL];

  __device__ __forceinline__ void load(const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }

  __device__ __forceinline__ void store(float* to) const {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
    *reinterpret_cast<float4*>(to + 4) = {x[4], x[5], x[6], x[7]};
  }

  // x L^-T for L L^T = the block. Two pivots at a time, for the latency of one: of (a b; b c) the second is
  // c - b^2 / a, and its inverse does not wait for that of a. The root of a negative one makes all NaN.
  __device__ __forceinline__ void solve(const float (*block)[PANEL]) {
    PanelRow d[PANEL];
#pragma unroll
    for (int i = 0; i < PANEL; i++) d[i].load(block[i]);
#pragma unroll
    for (int k = 0; k < PANEL; k += 2) {
      const float a = d[k].x[k], b = d[k + 1].x[k];
      const float determinant = a * d[k + 1].x[k + 1] - b * b;
      const float inverse_a = reciprocal_fast(a), inverse_c = a * reciprocal_fast(determinant);
      const float l = b * inverse_a;
      x[k + 1] -= l * x[k];
#pragma unroll
      for (int i = k + 2; i < PANEL; i++) d[i].x[k + 1] -= l * d[i].x[k];
#pragma unroll
      for (int j = k + 2; j < PANEL; j++) {
        const float first = d[j].x[k] * inverse_a, second = d[j].x[k + 1] * inverse_c;
        x[j] = x[j] - x[k] * first - x[k + 1] * second;
#pragma unroll
        for (int i = j; i < PANEL; i++) d[i].x[j] = d[i].x[j] - d[i].x[k] * first - d[i].x[k + 1] * second;
      }
      x[k] *= square_root_fast(inverse_a);
      x[k + 1] *= square_root_fast(inverse_c);
    }
  }
};

// row -= l times the transpose of 8 rows of solved columns.
__device__ __forceinline__ void subtract(PanelRow& row, const PanelRow& l, const float* rows) {
#pragma unroll
  for (int j = 0; j < PANEL; j++) {
    PanelRow other;
    other.load(rows + j * MOMENT_PITCH);
#pragma unroll
    for (int k = 0; k < PANEL; k++) row.x[j] -= l.x[k] * other.x[k];
  }
}

// Factors the matrix; thread: of PANEL_THREADS.
__device__ __forceinline__ void solve_panels(Shared& shared, int thread) {
  // Beside the matrix: the identity, of which a block's 16 rows begin anew with each, and the right-hand side.
  const int beside = thread - D;
  const bool is_identity = beside >= 0 && beside < BLOCK, is_row = beside <= BLOCK;
  float* row = beside < 0 ? shared.moments[thread] : is_identity ? shared.inverse[0][beside] : shared.right_side;
  PanelRow low, high;  // of the 16 columns at hand
  if (is_row) {
    low.load(row);
    high.load(row + PANEL);
  }
  if (thread < PANEL) low.store(shared.diagonal[0][thread]);
  barrier_sync(FACTORED, PANEL_THREADS);
  for (int b = 0; b < BLOCKS; b++) {
    const int top = b * BLOCK, next = top + BLOCK;
    // The last blocks below the diagonal have been read.
    if (b + 1 == BLOCKS) barrier_arrive(SOLVED, THREADS);
    if (is_row && thread >= top) {
      low.solve(shared.diagonal[0]);
      low.store(row + top);
    }
    barrier_sync(FACTORED, PANEL_THREADS);
    const bool in_high = is_row && thread >= top + PANEL;
    if (in_high) {
      subtract(high, low, &shared.moments[top + PANEL][top]);
      if (thread < next) high.store(shared.diagonal[1][thread - top - PANEL]);
    }
    barrier_sync(FACTORED, PANEL_THREADS);
    if (in_high) {
      high.solve(shared.diagonal[1]);
      high.store(row + top + PANEL);
    }
    if (b + 1 == BLOCKS) break;
    barrier_sync(SOLVED, THREADS);
    if (is_identity) {
      row = shared.inverse[b + 1][beside] - next;
      low.load(row + next);
      high.load(row + next + PANEL);
    } else if (is_row && thread >= next) {
      const PanelRow first = low, second = high;
      low.load(row + next);
      high.load(row + next + PANEL);
      subtract(low, first, &shared.moments[next][top]);
      subtract(low, second, &shared.moments[next][top + PANEL]);
      if (thread < next + PANEL) low.store(shared.diagonal[0][thread - next]);
      subtract(high, first, &shared.moments[next + PANEL][top]);
      subtract(high, second, &shared.moments[next + PANEL][top + PANEL]);
    }
    barrier_sync(FACTORED, PANEL_THREADS);
  }
}

// A block of 16 x 16 over a warp, as the tensor cores have an accumulator: rows g and g + 8 (g = lane / 4); columns
// 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t (t = lane % 4). As an operand, columns 2 t and 2 t + 1 stand for t and t + 4 of
// their eight: a sum may be taken in any order.
struct Tile {
  float x[2][4];

  __device__ __forceinline__ static int offset(int pitch) {
    const int lane = thread_index() % 32;
    return lane / 4 * pitch + lane % 4 * 2;
  }

  __device__ __forceinline__ void load(const float* block, int pitch) {
    block += offset(pitch);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const float2 pair = *reinterpret_cast<const float2*>(block + h * 8 * pitch + s * 8);
        x[h][2 * s] = pair.x, x[h][2 * s + 1] = pair.y;
      }
  }

  __device__ __forceinline__ void store(float* block, int pitch) const {
    block += offset(pitch);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < 2; s++)
        *reinterpret_cast<float2*>(block + h * 8 * pitch + s * 8) = {x[h][2 * s], x[h][2 * s + 1]};
  }

  // x = high + low: the nearest that tf32 holds, and the rest, of which the tensor cores keep as many bits again.
  __device__ __forceinline__ void split(Tile& high, Tile& low) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        high.x[h][e] = __uint_as_float((__float_as_uint(x[h][e]) + 0x1000u) & 0xffffe000u);
        low.x[h][e] = x[h][e] - high.x[h][e];
      }
  }
};

// A B^T; the products of two low parts, 2^-24 of the whole, are left out.
__device__ __forceinline__ Tile multiply(const Tile& a, const Tile& b) {
  Tile a_high, a_low, b_high, b_low, large = {}, first = {}, second = {};
  a.split(a_high, a_low);
  b.split(b_high, b_low);
  auto add = [](Tile& c, const Tile& a, const Tile& b, int column, int step) {
    multiply_add_tf32(c.x[0][2 * column], c.x[0][2 * column + 1], c.x[1][2 * column], c.x[1][2 * column + 1],
                      a.x[0][2 * step], a.x[1][2 * step], a.x[0][2 * step + 1], a.x[1][2 * step + 1],
                      b.x[column][2 * step], b.x[column][2 * step + 1]);
  };
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      add(large, a_high, b_high, column, step);
      add(first, a_high, b_low, column, step);
      add(second, a_low, b_high, column, step);
    }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int e = 0; e < 4; e++) large.x[h][e] += first.x[h][e] + second.x[h][e];
  return large;
}

// What the other warps do; warp: of UPDATE_WARPS.
__device__ __forceinline__ void update_rest(Shared& shared, int warp) {
  auto block_at = [&](int i, int j) { return &shared.moments[i * BLOCK][j * BLOCK]; };
  for (int b = 0; b < BLOCKS; b++) {
    barrier_sync(SOLVED, THREADS);
    if (warp == UPDATE_WARPS - 1) {
      // The right-hand side beyond the next 16 columns.
      const float* y = shared.right_side + b * BLOCK;
      for (int r = (b + 2) * BLOCK + thread_index() % 32; r < D; r += 32) {
        const float* l = &shared.moments[r][b * BLOCK];
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < BLOCK; k++) sums[k % 4] += l[k] * y[k];
        shared.right_side[r] -= (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
    // Blocks i >= j >= b + 2: the panel threads see to the next 16 columns.
    int i = b + 2, j = b + 2 + warp;
    while (true) {
      for (; j > i; i++) j -= i - b - 1;
      if (i >= BLOCKS) break;
      Tile a, left, right;
      a.load(block_at(i, j), MOMENT_PITCH);
      left.load(block_at(i, b), MOMENT_PITCH);
      right.load(block_at(j, b), MOMENT_PITCH);
      const Tile product = multiply(left, right);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 4; e++) a.x[h][e] -= product.x[h][e];
      a.store(block_at(i, j), MOMENT_PITCH);
      j += UPDATE_WARPS;
    }
    // Nobody reads the column before this one any more.
    if (b == 0) continue;
    for (int i = b + (UPDATE_WARPS - 1 - warp); i < BLOCKS; i += UPDATE_WARPS) {
      Tile l, m;
      l.load(block_at(i, b - 1), MOMENT_PITCH);
      m.load(shared.inverse[b - 1][0], INVERSE_PITCH);
      const Tile w = multiply(l, m);
      __syncwarp();
      w.store(block_at(i, b - 1), MOMENT_PITCH);
    }
  }
}

// The matrix of the system, in place of the moments of the keys (what lies above the diagonal blocks counts for
// nothing), its right-hand side, and the identity; by the transform warps.
__device__ __forceinline__ void centre_keys(Shared& shared, const lla::Call& call, const lla::RowIndex& row,
                                            int thread) {
  const float inverse_d1 = 1.0f / shared.sums.d1;
  const float ridge = row.ridge(call);
  constexpr int QUADS = D / 4;
  const int column = thread % QUADS * 4;
  const float4 means = *reinterpret_cast<const float4*>(&shared.sums.x[column]);
#pragma unroll 4
  for (int r = thread / QUADS; r < D; r += TRANSFORM_THREADS / QUADS) {
    float4* at = reinterpret_cast<float4*>(&shared.moments[r][column]);
    const float mean = shared.sums.x[r] * inverse_d1;
    float4 a = *at;
    a.x = (a.x - mean * means.x) * inverse_d1 + (r == column ? ridge : 0.0f);
    a.y = (a.y - mean * means.y) * inverse_d1 + (r == column + 1 ? ridge : 0.0f);
    a.z = (a.z - mean * means.z) * inverse_d1 + (r == column + 2 ? ridge : 0.0f);
    a.w = (a.w - mean * means.w) * inverse_d1 + (r == column + 3 ? ridge : 0.0f);
    *at = a;
  }
  if (thread < D) {
    float* identity = shared.inverse[thread / BLOCK][thread % BLOCK];
#pragma unroll
    for (int c = 0; c < BLOCK; c++) identity[c] = c == thread % BLOCK ? 1.0f : 0.0f;
    const float q = widen<BFLOAT>(query_of(call, row)[thread]);
    shared.right_side[thread] = q - shared.sums.origin[thread] - shared.sums.x[thread] * inverse_d1;
  }
}

// The slope u from y = L^-1 (q - kbar), from the last block up: u_p = M_p^T y_p - sum over i > p of W_ip^T u_i. By the
// first D threads.
__device__ __forceinline__ void substitute_back(Shared& shared, int thread) {
  const int block = thread / BLOCK;
  float u = 0.0f;
#pragma unroll
  for (int k = 0; k < BLOCK; k++)
    u += shared.inverse[block][thread % BLOCK][k] * shared.right_side[block * BLOCK + k];
  for (int p = BLOCKS - 1; p >= 0; p--) {
    if (block == p) shared.slope[thread] = u;
    float w[BLOCK];
#pragma unroll
    for (int r = 0; r < BLOCK; r++) w[r] = shared.moments[p * BLOCK + r][thread];
    barrier_sync(SUBSTITUTED, D);
    if (block >= p) continue;
    PanelRow slopes[2];
    slopes[0].load(&shared.slope[p * BLOCK]);
    slopes[1].load(&shared.slope[p * BLOCK + PANEL]);
    float sums[4] = {};
#pragma unroll
    for (int r = 0; r < BLOCK; r++) sums[r % 4] += w[r] * slopes[r / PANEL].x[r % PANEL];
    u -= (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// u, by all threads of a block that has its row's moments and sums.
__device__ __forceinline__ void solve_slope(Shared& shared, const lla::Call& call, const lla::RowIndex& row) {
  const int thread = thread_index() - MATRIX_THREADS;
  if (thread >= 0) {
    centre_keys(shared, call, row, thread);
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  }
  if (thread >= 0 && thread < PANEL_THREADS)
    solve_panels(shared, thread);
  else
    update_rest(shared, (thread < 0 ? thread + MATRIX_THREADS : thread + MATRIX_THREADS - PANEL_THREADS) / 32);
  __syncthreads();
  if (thread + MATRIX_THREADS < D) substitute_back(shared, thread + MATRIX_THREADS);
  __syncthreads();
}

// o = vbar + C_vk u.
__device__ __forceinline__ void write_output(Shared& shared, const lla::Call& call, const lla::RowIndex& row) {
  constexpr int PARTS = THREADS / D;
  const int thread = thread_index(), part = thread / D, channel = thread % D;
  const int first = part * (D / PARTS);
  float moments[2] = {}, along = 0.0f;
#pragma unroll
  for (int k = 0; k < D / PARTS; k++) {
    moments[k % 2] += shared.moments[first + k][D + channel] * shared.slope[first + k];
    along += shared.sums.x[first + k] * shared.slope[first + k];
  }
  const float inverse_d1 = 1.0f / shared.sums.d1;
  const float mean = shared.sums.x[D + channel] * inverse_d1;
  shared.output[part][channel] = (moments[0] + moments[1] - mean * along) * inverse_d1;
  __syncthreads();
  if (thread < D) {
    float o = shared.sums.origin[D + channel] + mean;
#pragma unroll
    for (int i = 0; i < PARTS; i++) o += shared.output[i][channel];
    if (!(row.ridge(call) > 0.0f)) o = quiet_nan();
    output_of(call, row)[channel] = narrow<BFLOAT>(o);
  }
}
