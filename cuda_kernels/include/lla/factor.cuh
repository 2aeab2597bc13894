#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by a blocked Cholesky factorisation in shared memory.
//
// The chain of pivots bounds it. Panels of 8 columns lie over the panel threads, one row of the matrix each: every
// thread factors the panel's diagonal block by itself, in registers, while it solves its own row, and then takes this
// panel's part from its row of the next one. So a panel costs two barriers, and no pivot waits for another thread. The
// right-hand side is one more row, and 16 rows of the identity give M^T = L^-T of every diagonal block of 16.
//
// The other warps update the rest of the trailing matrix one panel behind, by tensor cores, each number as two of tf32,
// which is nearly float32; and they fold M into the columns that are done, W = L M, which turns the back substitution
// into one product a block.

#include "ptx/mma.cuh"
#include "shape.cuh"

constexpr int PANEL = 8;
constexpr int PANELS = D / PANEL;
constexpr int BLOCK = 16;
constexpr int BLOCKS = D / BLOCK;
// The first transform warps: a row of the matrix each, then the rows beside it.
constexpr int PANEL_THREADS = D + 32;
constexpr int UPDATE_WARPS = WARPS - PANEL_THREADS / 32;

// The factor L of a diagonal block as unit triangle and pivots, and a row of the panel solved by it.
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

// Factors all panels; thread: of PANEL_THREADS.
__device__ __forceinline__ void solve_panels(Shared& shared, int thread) {
  // Beside the matrix: the identity, of which a block's 16 rows begin anew with each, and the right-hand side.
  const int beside = thread - D;
  const bool is_identity = beside >= 0 && beside < BLOCK, is_row = beside <= BLOCK;
  float* row = beside < 0 ? shared.moments[thread] : is_identity ? shared.inverse[0][beside] : shared.right_side;
  PanelRow mine;
  mine.load(row);
  if (thread < PANEL) mine.store(shared.diagonal[thread]);
  barrier_sync(FACTORED, PANEL_THREADS);
  for (int p = 0; p < PANELS; p++) {
    const int next = (p + 1) * PANEL;
    const bool active = is_row && thread >= p * PANEL;
    if (active) {
      mine.solve(shared.diagonal);
      mine.store(row + p * PANEL);
    }
    if (p + 1 == PANELS) break;
    barrier_sync(SOLVED, THREADS);
    if (is_row && thread >= next) {
      if (is_identity && p % 2 == 1) {
        row = shared.inverse[(p + 1) / 2][beside] - next;
        mine.load(row + next);
      } else {
        const PanelRow l = mine;
        mine.load(row + next);
#pragma unroll
        for (int j = 0; j < PANEL; j++) {
          PanelRow other;
          other.load(&shared.moments[next + j][p * PANEL]);
#pragma unroll
          for (int k = 0; k < PANEL; k++) mine.x[j] -= l.x[k] * other.x[k];
        }
      }
      if (thread < next + PANEL) mine.store(shared.diagonal[thread - next]);
    }
    barrier_sync(FACTORED, PANEL_THREADS);
  }
}

// Rows g and g + 8 (g = lane / 4) of a block of 16, and of its columns 2 t and 2 t + 1 (t = lane % 4) of every 8: an
// accumulator of the tensor cores, and either operand, of which these columns stand for t and t + 4: a sum may be
// taken in any order.
template <int COLUMNS>
struct Tile {
  float x[2][COLUMNS / 4];

  __device__ __forceinline__ static int offset(int pitch) {
    return threadIdx.x % 32 / 4 * pitch + threadIdx.x % 4 * 2;
  }

  __device__ __forceinline__ void load(const float* block, int pitch) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < COLUMNS / 8; s++) {
        const float2 pair = *reinterpret_cast<const float2*>(block + offset(pitch) + h * 8 * pitch + s * 8);
        x[h][2 * s] = pair.x, x[h][2 * s + 1] = pair.y;
      }
  }

  __device__ __forceinline__ void store(float* block, int pitch) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < COLUMNS / 8; s++)
        *reinterpret_cast<float2*>(block + offset(pitch) + h * 8 * pitch + s * 8) = {x[h][2 * s], x[h][2 * s + 1]};
  }

  // What tf32 keeps, and the rest, of which the tensor cores keep as much again.
  __device__ __forceinline__ void split(Tile& high, Tile& low) const {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < COLUMNS / 4; e++) {
        high.x[h][e] = __uint_as_float(__float_as_uint(x[h][e]) & 0xffffe000u);
        low.x[h][e] = x[h][e] - high.x[h][e];
      }
  }
};

// A B^T of two blocks of 16 rows; the products of two low parts, 2^-22 of the whole, are left out.
template <int COLUMNS>
__device__ __forceinline__ Tile<16> multiply(const Tile<COLUMNS>& a_high, const Tile<COLUMNS>& a_low,
                                             const Tile<COLUMNS>& b) {
  Tile<COLUMNS> b_high, b_low;
  b.split(b_high, b_low);
  Tile<16> large = {}, first = {}, second = {};
  auto add = [](Tile<16>& c, const Tile<COLUMNS>& a, const Tile<COLUMNS>& b, int column, int step) {
    multiply_add_tf32(c.x[0][2 * column], c.x[0][2 * column + 1], c.x[1][2 * column], c.x[1][2 * column + 1],
                      a.x[0][2 * step], a.x[1][2 * step], a.x[0][2 * step + 1], a.x[1][2 * step + 1],
                      b.x[column][2 * step], b.x[column][2 * step + 1]);
  };
#pragma unroll
  for (int step = 0; step < COLUMNS / 8; step++)
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
  for (int p = 0; p + 1 < PANELS; p++) {
    barrier_sync(SOLVED, THREADS);
    if (warp == UPDATE_WARPS - 1) {
      // The right-hand side's rest.
      PanelRow y;
      y.load(&shared.right_side[p * PANEL]);
      for (int r = (p + 2) * PANEL + threadIdx.x % 32; r < D; r += 32) {
        PanelRow l;
        l.load(&shared.moments[r][p * PANEL]);
        float sums[2] = {};
#pragma unroll
        for (int k = 0; k < PANEL; k++) sums[k % 2] += l.x[k] * y.x[k];
        shared.right_side[r] -= sums[0] + sums[1];
      }
    }
    // From panel p + 2 on, two panels at a time: a triangle of blocks, the last of a row perhaps half.
    const int first_row = p / 2 + 1, rows_left = BLOCKS - first_row;
    for (int n = warp; n < rows_left * (rows_left + 1) / 2; n += UPDATE_WARPS) {
      const int row = static_cast<int>((sqrtf(8 * n + 1) - 1) * 0.5f);
      const int i = first_row + row, column = p + 2 + 2 * (n - row * (row + 1) / 2);
      float* rows = shared.moments[i * BLOCK];
      const float* others = shared.moments[column * PANEL];
      Tile<8> left, left_high, left_low, right;
      Tile<16> a;
      left.load(rows + p * PANEL, MOMENT_PITCH);
      right.load(others + p * PANEL, MOMENT_PITCH);
      a.load(rows + column * PANEL, MOMENT_PITCH);
      left.split(left_high, left_low);
      const Tile<16> product = multiply(left_high, left_low, right);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 4; e++) a.x[h][e] -= product.x[h][e];
      if (column < 2 * i + 1) {
        a.store(rows + column * PANEL, MOMENT_PITCH);
      } else {
        // The second of the two lies beyond the diagonal block.
        const Tile<8> first = {{{a.x[0][0], a.x[0][1]}, {a.x[1][0], a.x[1][1]}}};
        first.store(rows + column * PANEL, MOMENT_PITCH);
      }
    }
    // Nobody reads the blocks of the last two panels any more.
    if (p == 0 || p % 2) continue;
    const int j = p / 2 - 1;
    for (int i = j + 1 + warp; i < BLOCKS; i += UPDATE_WARPS) {
      float* block = &shared.moments[i * BLOCK][j * BLOCK];
      Tile<16> l, l_high, l_low, m;
      l.load(block, MOMENT_PITCH);
      m.load(shared.inverse[j][0], INVERSE_PITCH);
      l.split(l_high, l_low);
      const Tile<16> w = multiply(l_high, l_low, m);
      __syncwarp();
      w.store(block, MOMENT_PITCH);
    }
  }
}

// The matrix of the system, in place of the moments of the keys, its right-hand side, and the identity; by the
// transform warps.
__device__ __forceinline__ void centre_keys(Shared& shared, const lla::Call& call, const lla::RowIndex& row, int thread) {
  const float inverse_d1 = 1.0f / shared.sums.d1;
  const float ridge = row.ridge(call);
  constexpr int QUADS = D / 4;
  const int column = thread % QUADS * 4;
  const float4 means = *reinterpret_cast<const float4*>(&shared.sums.x[column]);
#pragma unroll 4
  for (int r = thread / QUADS; r < D; r += TRANSFORM_THREADS / QUADS) {
    if (column > (r | (BLOCK - 1))) continue;
    float4* at = reinterpret_cast<float4*>(&shared.moments[r][column]);
    const float mean = shared.sums.x[r] * inverse_d1;
    float4 a = *at;
    a.x = (a.x - mean * means.x) * inverse_d1 + (r == column ? ridge : 0.0f);
    a.y = (a.y - mean * means.y) * inverse_d1 + (r == column + 1 ? ridge : 0.0f);
    a.z = (a.z - mean * means.z) * inverse_d1 + (r == column + 2 ? ridge : 0.0f);
    a.w = (a.w - mean * means.w) * inverse_d1 + (r == column + 3 ? ridge : 0.0f);
    *at = a;
  }
  for (int e = thread; e < BLOCKS * BLOCK * BLOCK; e += TRANSFORM_THREADS)
    shared.inverse[e / (BLOCK * BLOCK)][e / BLOCK % BLOCK][e % BLOCK] = e / BLOCK % BLOCK == e % BLOCK ? 1.0f : 0.0f;
  if (thread < D) {
    const float q = widen<BFLOAT>(query_of(call, row)[thread]);
    shared.right_side[thread] = q - shared.sums.origin[thread] - shared.sums.x[thread] * inverse_d1;
  }
}

// The slope u from y = L^-1 (q - kbar), from the last block up: u_p = M_p^T y_p - sum over i > p of W_ip^T u_i. By the
// first D threads.
__device__ __forceinline__ void substitute_back(Shared& shared) {
  const int thread = threadIdx.x, block = thread / BLOCK;
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
  const int thread = threadIdx.x - MATRIX_THREADS;
  if (thread >= 0) {
    centre_keys(shared, call, row, thread);
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  }
  if (thread >= 0 && thread < PANEL_THREADS)
    solve_panels(shared, thread);
  else
    update_rest(shared, thread < 0 ? threadIdx.x / 32 : (threadIdx.x - PANEL_THREADS) / 32);
  __syncthreads();
  if (threadIdx.x < D) substitute_back(shared);
  __syncthreads();
}

// o = vbar + C_vk u.
__device__ __forceinline__ void write_output(Shared& shared, const lla::Call& call, const lla::RowIndex& row) {
  constexpr int PARTS = THREADS / D;
  const int part = threadIdx.x / D, channel = threadIdx.x % D;
  float moments[2] = {}, along = 0.0f;
#pragma unroll 8
  for (int k = part * (D / PARTS); k < (part + 1) * (D / PARTS); k++) {
    moments[k % 2] += shared.moments[k][D + channel] * shared.slope[k];
    along += shared.sums.x[k] * shared.slope[k];
  }
  const float inverse_d1 = 1.0f / shared.sums.d1;
  const float mean = shared.sums.x[D + channel] * inverse_d1;
  shared.output[part][channel] = (moments[0] + moments[1] - mean * along) * inverse_d1;
  __syncthreads();
  if (threadIdx.x < D) {
    float o = shared.sums.origin[D + channel] + mean;
#pragma unroll
    for (int i = 0; i < PARTS; i++) o += shared.output[i][channel];
    if (!(row.ridge(call) > 0.0f)) o = quiet_nan();
    output_of(call, row)[channel] = narrow<BFLOAT>(o);
  }
}
