#pragma once
// The slope of a row, (C_kk + ridge I) u = q - kbar: by conjugate gradients on the moments in registers or, where these do not
// get there, by a Cholesky factorisation in blocks of 16.

#include "lla/blocks.cuh"
#include "lla/progress.cuh"
#include "lla/two_pass/product.cuh"

// The lane's entries of the right-hand side.
__device__ __forceinline__ Entries right_side(const Shared& shared, int lane) {
  Entries x;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) {
    const int column = column_of_entry(lane, e);
    const float q = widen<BFLOAT>(reinterpret_cast<const half_bits*>(shared.query[column / 64])[column % 64]);
    x.of[e] = q - shared.mean[column];
  }
  return x;
}

// The moments about the mean and divided by their weight, in place.
__device__ __forceinline__ void complete_moments(const Shared& shared, float (&c)[D / 2]) {
  const int thread = thread_index(), upper = upper_row(thread), column = thread % 4 * 2;
  const float inverse_d1 = inverse_weight(shared.d1), factor = inverse_d1 * shared.inverse_scale * shared.inverse_scale;
  const float means[2] = {inverse_d1 * inverse_d1 * shared.sums[upper], inverse_d1 * inverse_d1 * shared.sums[upper + 8]};
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[8 * j + column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      c[4 * j + 2 * h] = factor * c[4 * j + 2 * h] - means[h] * sums.x;
      c[4 * j + 2 * h + 1] = factor * c[4 * j + 2 * h + 1] - means[h] * sums.y;
    }
  }
}

// Steps from a slope of 0: whether x solves the system, as all lanes find.
__device__ __forceinline__ bool solve_by_steps(Shared& shared, const Matrix& matrix, float ridge, Entries& x) {
  const int thread = thread_index(), lane = thread % 32;
  Progress progress(ridge);
  Entries r = right_side(shared, lane), p = {}, s = {};
  x = {};
  bool small;
  int number = 0;
#pragma unroll 1
  while (true) {
    const Product product = multiply(shared, matrix, r, thread);
    // Beside the product, whose latency hides it.
    progress.look(inner_product(r, r), ridge);
    // The same in all lanes, as the compiler sees by this.
    small = __any_sync(~0u, progress.is_small(progress.gamma, ridge, TOLERANCE));
    if (small || __any_sync(~0u, !(progress.gamma < -minus_infinity())) || number >= MOST_STEPS) break;
    float curvature;
    const Entries w = exchange(shared, product, thread, number, curvature);
    progress.advance(__fmaf_rn(ridge, progress.gamma, curvature));
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
      s.of[e] = __fmaf_rn(progress.beta, s.of[e], __fmaf_rn(ridge, r.of[e], w.of[e]));
      p.of[e] = __fmaf_rn(progress.beta, p.of[e], r.of[e]);
      x.of[e] = __fmaf_rn(progress.alpha, p.of[e], x.of[e]);
      r.of[e] = __fmaf_rn(-progress.alpha, s.of[e], r.of[e]);
    }
    number++;
  }
  if (!small) return false;
  __syncwarp();
  float curvature;
  const Entries product = exchange(shared, multiply(shared, matrix, x, thread), thread, number, curvature), right = right_side(shared, lane);
  Entries residual;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) residual.of[e] = right.of[e] - __fmaf_rn(ridge, x.of[e], product.of[e]);
  return __any_sync(~0u, progress.is_small(inner_product(residual, residual), ridge, 2.0f * TOLERANCE));
}

__device__ __forceinline__ float* block_at(Shared& shared, int i, int j) { return &shared.moments[i * BLOCK][j * BLOCK]; }

// By the factorisation of the completed moments; nothing is on its way to the ring, whose place it takes. With M = L^-1 of the diagonal blocks, the panels
// are Q_i = A_ib M^T, and L^-1 and then L^-T are applied to the right side block by block.
__device__ __forceinline__ void solve_by_factor(Shared& shared, const float (&c)[D / 2], float ridge, Entries& x) {
  constexpr int BLOCKS = D / BLOCK;
  // Anew: what is derived from it would be kept over the steps.
  const int thread = thread_index();
  const int lane = thread % 32, warp = thread / 32;
  const int upper = upper_row(thread), column = thread % 4 * 2;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = upper + 8 * h;
      float2 pair = {c[4 * j + 2 * h], c[4 * j + 2 * h + 1]};
      if (row == 8 * j + column) pair.x += ridge;
      if (row == 8 * j + column + 1) pair.y += ridge;
      *reinterpret_cast<float2*>(&shared.moments[row][8 * j + column]) = pair;
    }
  if (warp == 0) {
    const Entries right = right_side(shared, lane);
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) shared.slope[column_of_entry(lane, e)] = right.of[e];
  }
  meet();
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b++) {
    if (warp == 0) {
      Tile pivots;
      pivots.load(block_at(shared, b, b), MOMENT_PITCH);
      pivots.factor();
      pivots.store(shared.inverse[b][0], INVERSE_PITCH);
    }
    meet();
    const int i = b + 1 + warp;
    if (i < BLOCKS) {
      Tile a, m;
      a.load(block_at(shared, i, b), MOMENT_PITCH);
      m.load(shared.inverse[b][0], INVERSE_PITCH);
      multiply(Operand(a), Operand(m)).store(block_at(shared, i, b), MOMENT_PITCH);
    } else if (warp == WARPS - 1) {
      float y = 0.0f;
      for (int k = 0; k < BLOCK; k++) y += shared.inverse[b][lane % BLOCK][k] * shared.slope[b * BLOCK + k];
      __syncwarp();
      if (lane < BLOCK) shared.slope[b * BLOCK + lane] = y;
    }
    meet();
    int number = 0;
#pragma unroll 1
    for (int i = b + 1; i < BLOCKS; i++)
#pragma unroll 1
      for (int j = b + 1; j <= i; j++)
        if (number++ % WARPS == warp) {
          Tile a, left, right;
          left.load(block_at(shared, i, b), MOMENT_PITCH);
          right.load(block_at(shared, j, b), MOMENT_PITCH);
          a.load(block_at(shared, i, j), MOMENT_PITCH);
          a.subtract(multiply(Operand(left), Operand(right)));
          a.store(block_at(shared, i, j), MOMENT_PITCH);
        }
    if (thread < D && thread >= (b + 1) * BLOCK) {
      float sum = 0.0f;
      for (int k = 0; k < BLOCK; k++) sum += shared.moments[thread][b * BLOCK + k] * shared.slope[b * BLOCK + k];
      shared.slope[thread] -= sum;
    }
    meet();
  }
#pragma unroll 1
  for (int b = BLOCKS - 1; b >= 0; b--) {
    if (warp == 0) {
      float y = 0.0f;
      for (int k = 0; k < BLOCK; k++) y += shared.inverse[b][k][lane % BLOCK] * shared.slope[b * BLOCK + k];
      __syncwarp();
      if (lane < BLOCK) shared.slope[b * BLOCK + lane] = y;
    }
    meet();
    if (thread < b * BLOCK) {
      float sum = 0.0f;
      for (int k = 0; k < BLOCK; k++) sum += shared.moments[b * BLOCK + k][thread] * shared.slope[b * BLOCK + k];
      shared.slope[thread] -= sum;
    }
    meet();
  }
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) x.of[e] = ridge > 0.0f ? shared.slope[column_of_entry(lane, e)] : quiet_nan();
  meet();
}
