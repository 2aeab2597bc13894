#pragma once
// The ridge system of a row, (C_kk + ridge I) u = q - kbar, by a Gauss-Jordan elimination of blocks of 16.
//
// Step b takes block b out of every other row, those above it too, so that no substitution follows. With M = L^-1 for
// L L^T = A_bb, Q_i = A_ib M^T, and then A_bb = -I:
//   A_ij -= Q_i Q_j^T for j > b and all i, but those between b and j, which symmetry gives (A_bj is 0 before),
//   r_i -= Q_i M r_b for all i (r_b is 0 before).
// Products with the inverse of A_bb would be fewer, but are wrong where one key outweighs all.
//
// The chain of pivots bounds it: one warp does nothing but find M, make the next diagonal block and go on with that.
// Meanwhile two warps for each column of blocks, which keep it in registers, take the step. Column b + 1 is then done,
// and goes to shared memory for all; so does the diagonal block b + 2, as the pivots are a step ahead. One warp has the
// right-hand side. Products are those of tensor cores, each number as two of tf32, which is nearly float32.
//
// A row's system is solved once: what is not unrolled here need not be fetched.

#include "lla/blocks.cuh"
#include "lla/shape.cuh"

constexpr int BLOCKS = D / BLOCK;
static_assert(WARPS == 2 * BLOCKS, "two warps a column but the first, one for the pivots and one for the right side");

__device__ __forceinline__ float* block_at(Shared& shared, int i, int j) {
  return &shared.moments[i * BLOCK][j * BLOCK];
}

// Factors the diagonal blocks, one after the other; by one warp.
__device__ __forceinline__ void factor_diagonal(Shared& shared) {
  const int lane = thread_index() % 32;
  Tile m = {};
#pragma unroll 1
  for (int b = 0; b < BLOCKS; b++) {
    Tile next, minus_identity;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        minus_identity.x[h][e] = lane / 4 + 8 * h == lane % 4 * 2 + e % 2 + e / 2 * 8 ? -1.0f : 0.0f;
    if (b > 0) {
      const Operand right(m);
      meet(shared.solved, b - 1 & 1);
      Tile q;
      q.load(block_at(shared, b, b - 1), MOMENT_PITCH);
      next.load(block_at(shared, b, b), MOMENT_PITCH);
      q = multiply(Operand(q), right);
      q.store(block_at(shared, b, b - 1), MOMENT_PITCH);
      come(shared.panelled);
      const Operand both(q);
      next.subtract(multiply(both, both));
    } else {
      next.load(block_at(shared, b, b), MOMENT_PITCH);
    }
    minus_identity.store(block_at(shared, b, b), MOMENT_PITCH);
    m = next;
    m.factor();
    m.store(shared.inverse[b % 2][0], INVERSE_PITCH);
  }
}

// The steps in every other block of a column but the first; by one warp, `other` of those that do.
__device__ __forceinline__ void eliminate(Shared& shared, int other, int column, int parity) {
  Tile tiles[BLOCKS / 2];
#pragma unroll
  for (int n = 0; n < BLOCKS / 2; n++) {
    const int i = 2 * n + parity;
    tiles[n] = {};
    if (i >= column) tiles[n].load(block_at(shared, i, column), MOMENT_PITCH);
  }
#pragma unroll 1
  for (int b = 0; b + 1 < BLOCKS; b++) {
    meet(shared.solved, b & 1);
    // Q of the next row is made with the pivots.
    if (other < BLOCKS && other != b + 1) {
      float* at = block_at(shared, other, b);
      Tile a, m;
      a.load(at, MOMENT_PITCH);
      m.load(shared.inverse[b % 2][0], INVERSE_PITCH);
      multiply(Operand(a), Operand(m)).store(at, MOMENT_PITCH);
    }
    meet(shared.panelled, b & 1);
    if (b >= column) continue;
    Tile right;
    right.load(block_at(shared, column, b), MOMENT_PITCH);
    const Operand q(right);
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; n++) {
      const int i = 2 * n + parity;
      // The next diagonal block is with the pivots.
      if (i > b && (i < column || i == b + 1)) continue;
      Tile left;
      left.load(block_at(shared, i, b), MOMENT_PITCH);
      tiles[n].subtract(multiply(Operand(left), q));
      if (column == b + 1 || (column == b + 2 && i == column))
        tiles[n].store(block_at(shared, i, column), MOMENT_PITCH);
    }
  }
}

// M r_b of step b, a row a lane of each half of the warp.
__device__ __forceinline__ float solve_block(const Shared& shared, int b) {
  const int lane = thread_index() % 32, half = lane / BLOCK * 8;
  const float* m = &shared.inverse[b % 2][lane % BLOCK][half];
  const float* r = &shared.slope[b * BLOCK + half];
  float sums[2] = {};
#pragma unroll
  for (int k = 0; k < 8; k++) sums[k % 2] += m[k] * r[k];
  const float sum = sums[0] + sums[1];
  return sum + __shfl_xor_sync(~0u, sum, BLOCK);
}

// The steps in the right-hand side; by one warp.
__device__ __forceinline__ void solve_right_side(Shared& shared, const lla::Call& call, const lla::RowIndex& row) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int channel = lane; channel < D; channel += 32) {
    const float q = widen<BFLOAT>(query_of(call, row)[channel]);
    shared.slope[channel] = q - shared.total.mean[channel];
  }
#pragma unroll 1
  for (int b = 0; b + 1 < BLOCKS; b++) {
    meet(shared.solved, b & 1);
    const float solved = solve_block(shared, b);
    float y[BLOCK];
#pragma unroll
    for (int k = 0; k < BLOCK; k++) y[k] = __shfl_sync(~0u, solved, k);
    meet(shared.panelled, b & 1);
#pragma unroll 1
    for (int channel = lane; channel < D; channel += 32) {
      const float* q = &shared.moments[channel][b * BLOCK];
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < BLOCK; k++) sums[k % 4] += q[k] * y[k];
      const float r = channel / BLOCK == b ? 0.0f : shared.slope[channel];
      shared.slope[channel] = r - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
  }
}

// All but the last step in the right-hand side, by all threads of a block that has its row's moments and means. Ends in
// no barrier. The first of those within orders the moments of the values, which need not be complete before.
__device__ __forceinline__ void solve_slope(Shared& shared, const lla::Call& call, const lla::RowIndex& row) {
  // A multiprocessor's scheduler has every fourth warp: that of the pivots is left nearly to them, with the right-hand
  // side and, of eight columns, the one that is done first.
  const int warp = __shfl_sync(~0u, thread_index() / 32, 0);
  const int quad = warp / 4, scheduler = warp % 4;
  if (warp == WARPS - 1) {
    factor_diagonal(shared);
  } else if (warp == WARPS - 5) {
    solve_right_side(shared, call, row);
  } else {
    const bool first = scheduler == 3;
    const int other = first ? WARPS - 4 + quad : quad * 3 + scheduler;
    const int column = first ? 1 : BLOCKS / 4 + other / 2, parity = first ? quad : other % 2;
    eliminate(shared, other, column, parity);
  }
}

// o = vbar + C_vk u; after solve_slope.
__device__ __forceinline__ void write_output(Shared& shared, BlockMeeting& meet_block, const lla::Call& call, const lla::RowIndex& row) {
  // A warp has eight rows of the moments, a lane of it four neighbouring channels of all or of every other.
  constexpr int LANES = D / 4, APART = 32 / LANES, ROWS = 8 / APART;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int first = warp * 8, channel = lane % LANES * 4;
  float4 moments[ROWS];
#pragma unroll
  for (int k = 0; k < ROWS; k++)
    moments[k] = *reinterpret_cast<const float4*>(&shared.moments[first + k * APART + lane / LANES][D + channel]);
  meet_block();

  // The last step, where no row is below: A M^T M r, and nobody made Q = A M^T. Each warp takes it in its own rows.
  constexpr int LAST = BLOCKS - 1;
  const int half = lane / BLOCK * 8, quad = lane % 4, own = first + lane / 4;
  const float y = solve_block(shared, LAST);
  float sums[2] = {};
#pragma unroll
  for (int k = 0; k < 8; k++)
    sums[k % 2] += shared.inverse[LAST % 2][half + k][lane % BLOCK] * __shfl_sync(~0u, y, half + k);
  float solved = sums[0] + sums[1];
  solved += __shfl_xor_sync(~0u, solved, BLOCK);
  float product = 0.0f;
#pragma unroll
  for (int k = 0; k < 4; k++)
    product += shared.moments[own][LAST * BLOCK + quad * 4 + k] * __shfl_sync(~0u, solved, quad * 4 + k);
  product += __shfl_xor_sync(~0u, product, 1);
  product += __shfl_xor_sync(~0u, product, 2);
  const float slope = (own / BLOCK == LAST ? 0.0f : shared.slope[own]) - product;

  float4 sum = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < ROWS; k++) {
    const float u = __shfl_sync(~0u, slope, (k * APART + lane / LANES) * 4);
    sum.x += moments[k].x * u, sum.y += moments[k].y * u, sum.z += moments[k].z * u, sum.w += moments[k].w * u;
  }
  if constexpr (APART == 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, LANES), sum.y += __shfl_xor_sync(~0u, sum.y, LANES);
    sum.z += __shfl_xor_sync(~0u, sum.z, LANES), sum.w += __shfl_xor_sync(~0u, sum.w, LANES);
  }
  if (lane < LANES) *reinterpret_cast<float4*>(&shared.output[warp][channel]) = sum;
  meet_block();
  if (thread < D) {
    float sums[4] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) sums[w % 4] += shared.output[w][thread];
    float o = shared.total.mean[D + thread] + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (!(row.ridge(call) > 0.0f)) o = quiet_nan();
    output_of(call, row)[thread] = narrow<BFLOAT>(o);
  }
}
