#pragma once
// The products of a tile's keys with the rows of an operand, by all warps.

#include "lla/accumulators.cuh"
#include "lla/two_pass/copies.cuh"
#include "ptx/wgmma.cuh"

// KEYS_ARE_X: in float16, whatever the row's numbers are. They are for the reader of a group of products.
template <bool KEYS_ARE_X>
__device__ __forceinline__ void multiply_rows(const Shared& shared, unsigned slot, float (&products)[4]) {
  const unsigned long long keys = channels_innermost(slot_address(shared, slot));
  const unsigned long long rows = channels_innermost(shared_address(shared.query));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    const unsigned in_row = step % 4 * 32;
    wgmma_scores<BFLOAT && !KEYS_ARE_X>(products, keys + descriptor_step(step / 4 * RUN + in_row), rows + descriptor_step(step / 4 * VECTOR + in_row), step > 0);
  }
  wgmma_commit();
}

// The products with the query, in units of log2; -inf for keys that are not seen.
__device__ __forceinline__ void give_scores(Shared& shared, const Source& from, int tile, int thread, const float (&products)[4], float scale_log2) {
  if (thread % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int in_tile = upper_row(thread) + 8 * h;
      const bool is_seen = from.is_seen(from.position(tile) + in_tile);
      shared.scores[tile % SCORE_STAGES][in_tile] = is_seen ? scale_log2 * products[2 * h] : minus_infinity();
    }
  }
}
