#pragma once
// Products of a tile's keys with a vector or two, on tensor cores, by the warp that also makes X of these keys: what it needs of
// them no other warp has to wait for.

#include "lla/two_pass/copies.cuh"
#include "ptx/mma.cuh"

constexpr int KEYS_OF_WARP = TILE / WARPS;
static_assert(KEYS_OF_WARP == 16, "the rows of a product");

// Where a lane reads a warp's keys in a slot, as rows of an operand of the tensor cores.
__device__ __forceinline__ unsigned rows_of_warp(int thread) {
  const int lane = thread % 32, key = thread / 32 * KEYS_OF_WARP + lane / 8 % 2 * 8 + lane % 8;
  return key * 128 + ((lane / 16 ^ key % 8) << 4);
}

// An operand of two vectors, columns 0 and 1, of which a lane has pairs of its column's numbers: 2 t and 2 t + 1 of every 8
// (t = lane % 4). In shared memory they lie as lanes take them, on different banks.
__device__ __forceinline__ half_bits& entry_of_column(LyingColumn& column, int number) { return column[number % 8 / 2][number / 8 * 2 + number % 2]; }

struct Columns {
  uint4 quads[D / 32];

  // zeros: 32 of them.
  __device__ __forceinline__ Columns(int lane, const LyingColumn& first, const LyingColumn& second, const half_bits* zeros) {
    const half_bits* from = lane < 4 ? first[lane % 4] : lane < 8 ? second[lane % 4] : zeros;
#pragma unroll
    for (int q = 0; q < D / 32; q++) quads[q] = reinterpret_cast<const uint4*>(from)[q];
  }
};

// The products of the warp's keys in a slot with both columns: of key g = lane / 4 and of that 8 further on, in the lanes of which
// lane % 4 is 0.
template <bool BFLOAT16>
__device__ __forceinline__ void multiply_keys(unsigned slot, unsigned rows, const Columns& columns, float2 (&products)[2]) {
  // Sums that do not wait for one another hide each other's latency.
  float c[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    constexpr int STEPS = D / 32;
    unsigned keys[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) load_matrices(keys[step], ((slot + rows) ^ step % 4 << 5) + half * RUN);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      float(&sum)[4] = c[step % 2];
      const uint4 quad = columns.quads[half * STEPS / 2 + step / 2];
      multiply_add<BFLOAT16>(sum[0], sum[1], sum[2], sum[3], keys[step], step % 2 ? quad.z : quad.x, step % 2 ? quad.w : quad.y);
    }
  }
  products[0] = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
  products[1] = {c[0][2] + c[1][2], c[0][3] + c[1][3]};
}
static_assert(RUNS == 2, "a half of the steps is of a run");

// The products with the query of a tile that has come, in units of log2, to the warp's part of shared.scores; -inf for keys that are not
// seen. Returns the largest that the lane has.
__device__ __forceinline__ float give_scores(Shared& shared, const Source& from, int tile, unsigned slot, int thread, unsigned rows, const Columns& query, float scale_log2) {
  float2 products[2];
  multiply_keys<BFLOAT>(slot, rows, query, products);
  float largest = minus_infinity();
  if (thread % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int in_tile = thread / 32 * KEYS_OF_WARP + thread % 32 / 4 + 8 * h;
      const float score = from.is_seen(from.position(tile) + in_tile) ? scale_log2 * products[h].x : minus_infinity();
      shared.scores[tile % SCORE_STAGES][in_tile] = score;
      largest = fmaxf(largest, score);
    }
  }
  __syncwarp();
  return largest;
}
