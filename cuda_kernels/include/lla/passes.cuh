#pragma once
// A pass over a block's keys, and whether there is another.

#include "lla/copies.cuh"
#include "lla/moments.cuh"
#include "lla/shape.cuh"

// Whether X was out of float16's range, and the tiles must be taken again; by all threads, after a pass. `id`, `threads`: a
// hardware barrier of the role, for nothing but that the compiler knows that all lanes of a warp agree. AHEAD: by the transform warps,
// whether they do not wait for the last products before they know that there is no other pass; then before wait_for_products they
// touch nothing that these read.
template <bool AHEAD = false>
__device__ __forceinline__ bool again(Shared& shared, int id, int threads) {
  // The first pass meets three times where it is not the last.
  const unsigned parity = shared.exact;
  if constexpr (AHEAD) {
    // All have left their sums.
    barrier_sync(id, threads);
    come(shared.met);
  } else {
    meet(shared.met, parity);
  }
  if (shared.exact || !shared.out_of_range) return false;
  if constexpr (AHEAD) mbarrier_wait(shared_address(&shared.met), parity);
  meet(shared.met, parity ^ 1);
  const int thread = thread_index();
  if (thread < 2 * D) shared.origin[thread] = 0.0f;
  if (thread < 32) {
    end_pass(shared, thread);
    if (thread == 0) begin_barriers(shared, 0, BARRIERS, 1), begin_pass(shared), shared.bad_page = 0, shared.exact = 1;
  }
  meet(shared.met, parity);
  barrier_sync(id, threads);
  return true;
}

// Of the last pass.
__device__ __forceinline__ void wait_for_products(const Shared& shared) { mbarrier_wait(shared_address(&shared.met), shared.exact); }

// KEY_COLUMNS: how many columns of the keys' moments a warpgroup has, those up to its own.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate_all(Shared& shared, const lla::Call& call, const Maps& maps, float (&c)[D], int tiles, unsigned early = 0, unsigned query_run = 0) {
  Moments<KEY_COLUMNS> moments{c};
#pragma unroll 1
  while (accumulate<KEY_COLUMNS>(shared, call, maps, moments, tiles, early, query_run), again(shared, KEY_COLUMNS > 64 ? LAST_MATRIX : FIRST_MATRIX, 128)) early = 0;
}
