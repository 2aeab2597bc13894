#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by a Cholesky factorisation in blocks of 16, by the matrix warps alone: where
// conjugate gradients do not get there.

#include "lla/blocks.cuh"
#include "lla/steps.cuh"

__device__ __forceinline__ float* block_at(Shared& shared, int i, int j) { return &shared.moments[i * BLOCK][j * BLOCK]; }

// By all matrix warps, whose moments are c, as conjugate gradients take them; nothing is on its way to the ring, whose place
// the moments take. With M = L^-1 of the diagonal blocks, the panels are Q_i = A_ib M^T, and L^-1 and then L^-T are applied to the right
// side block by block.
__device__ __forceinline__ void solve_by_factor(Shared& shared, float* c, float ridge, Entries& x) {
  constexpr int BLOCKS = D / BLOCK;
  // Anew: what is derived from it would be kept over the steps.
  const int thread = thread_index();
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++) pair_lanes(c + b * D / 2, lane, true);
  const int upper = upper_row(thread), column = thread % 4 * 2;
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++)
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = 64 * b + upper + 8 * h;
        float2 pair = {c[b * D / 2 + 4 * j + 2 * h], c[b * D / 2 + 4 * j + 2 * h + 1]};
        if (row == 8 * j + column) pair.x += ridge;
        if (row == 8 * j + column + 1) pair.y += ridge;
        *reinterpret_cast<float2*>(&shared.moments[row][8 * j + column]) = pair;
      }
  if (warp == 0) {
    const Entries right = right_side(shared, lane);
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) shared.slope[column_of_entry(lane, e)] = right.of[e];
  }
  meet_matrix_warps();
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b++) {
    if (warp == 0) {
      Tile pivots;
      pivots.load(block_at(shared, b, b), MOMENT_PITCH);
      pivots.factor();
      pivots.store(shared.inverse[b][0], INVERSE_PITCH);
    }
    meet_matrix_warps();
#pragma unroll 1
    for (int i = b + 1 + warp; i < BLOCKS; i += MATRIX_WARPS) {
      Tile a, m;
      a.load(block_at(shared, i, b), MOMENT_PITCH);
      m.load(shared.inverse[b][0], INVERSE_PITCH);
      multiply(Operand(a), Operand(m)).store(block_at(shared, i, b), MOMENT_PITCH);
    }
    if (warp == MATRIX_WARPS - 1) {
      float y = 0.0f;
      for (int k = 0; k < BLOCK; k++) y += shared.inverse[b][lane % BLOCK][k] * shared.slope[b * BLOCK + k];
      __syncwarp();
      if (lane < BLOCK) shared.slope[b * BLOCK + lane] = y;
    }
    meet_matrix_warps();
    int number = 0;
#pragma unroll 1
    for (int i = b + 1; i < BLOCKS; i++)
#pragma unroll 1
      for (int j = b + 1; j <= i; j++)
        if (number++ % MATRIX_WARPS == warp) {
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
    meet_matrix_warps();
  }
#pragma unroll 1
  for (int b = BLOCKS - 1; b >= 0; b--) {
    if (warp == 0) {
      float y = 0.0f;
      for (int k = 0; k < BLOCK; k++) y += shared.inverse[b][k][lane % BLOCK] * shared.slope[b * BLOCK + k];
      __syncwarp();
      if (lane < BLOCK) shared.slope[b * BLOCK + lane] = y;
    }
    meet_matrix_warps();
    if (thread < b * BLOCK) {
      float sum = 0.0f;
      for (int k = 0; k < BLOCK; k++) sum += shared.moments[b * BLOCK + k][thread] * shared.slope[b * BLOCK + k];
      shared.slope[thread] -= sum;
    }
    meet_matrix_warps();
  }
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) x.of[e] = ridge > 0.0f ? shared.slope[column_of_entry(lane, e)] : quiet_nan();
  meet_matrix_warps();
}
