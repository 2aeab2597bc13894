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

// Vectors as columns 0 and 1 of an operand, of which each lane has its column's numbers 2 t and 2 t + 1 of every 8 (t = lane % 4).
struct Columns {
  unsigned pairs[D / 8];

  // pair_of(column, number): numbers `number` and that after it, of column 0 or 1.
  template <class PairOf>
  __device__ __forceinline__ Columns(int lane, PairOf pair_of) {
#pragma unroll
    for (int j = 0; j < D / 8; j++) pairs[j] = lane < 8 ? pair_of(lane / 4, 8 * j + lane % 4 * 2) : 0;
  }
};

// The products of the warp's keys in a slot with both columns: of key g = lane / 4 and of that 8 further on, in the lanes of which
// lane % 4 is 0.
template <bool BFLOAT16>
__device__ __forceinline__ void multiply_keys(unsigned slot, unsigned rows, const Columns& columns, float2 (&products)[2]) {
  // Sums that do not wait for one another hide each other's latency.
  float c[2][4] = {};
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    unsigned keys[4];
    load_matrices(keys, ((slot + rows) ^ step % 4 << 5) + step / 4 * RUN);
    float(&sum)[4] = c[step % 2];
    multiply_add<BFLOAT16>(sum[0], sum[1], sum[2], sum[3], keys, columns.pairs[2 * step], columns.pairs[2 * step + 1]);
  }
  products[0] = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
  products[1] = {c[0][2] + c[1][2], c[0][3] + c[1][3]};
}

__device__ __forceinline__ Columns query_columns(const Shared& shared, int lane) {
  return Columns(lane, [&](int column, int number) {
    return column == 0 ? *reinterpret_cast<const unsigned*>(&shared.query[number / 64][number % 64]) : 0u;
  });
}

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
