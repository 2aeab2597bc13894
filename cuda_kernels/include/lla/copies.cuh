#pragma once
// Keys and values from memory to the ring, by the copy engine: a run of them by a warp, a box of it by a lane. The first
// ones are brought by transform warps, all others by those of the last matrix warpgroup, which have the time.

#include "lla/shape.cuh"
#include "maps.cuh"
#include "ptx/mbarrier.cuh"

constexpr int COPYING_WARPS = 2 * RUNS;
static_assert(COPYING_WARPS <= 4);

// Brings a box of a warp's run of a tile, and counts it where all of the tile's are waited for.
__device__ __forceinline__ void bring(Shared& shared, const lla::Call& call, const Maps& maps, int warp, int tile, int box) {
  const int position = shared.begin + tile * TILE + box * BOX, slot = tile % SLOTS;
  const unsigned barrier = shared_address(&shared.raw_full[slot]);
  bool present = position < shared.end;
  int outer = shared.batch, place = position;
#if PAGED
  if (present) {
    const long long page = index_at(call.page_table, shared.batch * call.page_table_stride + position / call.page_size,
                                    call.page_table_wide);
    present = page >= 0 && page < call.num_pages;
    if (!present) atomicMax(&shared.bad_page, 1);
    outer = static_cast<int>(page);
  }
  place = position % call.page_size;
#endif
  mbarrier_arrive_expect(barrier, present ? BOX * 128 : 0);
  if (!present) return;
  const unsigned to = shared_address(shared.ring[slot]) + warp * RUN + box * BOX * 128;
  box_copy(to, warp < RUNS ? maps.k : maps.v, 0, place, column_of_place(warp) % D / 64, shared.kv_head, outer, barrier);
}

// The first tiles of a pass; by the transform warps.
__device__ __forceinline__ void bring_first(Shared& shared, const lla::Call& call, const Maps& maps, int tiles) {
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, tile = thread % 32 / BOXES;
  if (warp < COPYING_WARPS && tile < min(SLOTS, tiles)) bring(shared, call, maps, warp, tile, thread % BOXES);
  __syncwarp();
}

// The tile that takes the place of tile `free`, once the matrix units are done with that; by a matrix warpgroup.
__device__ __forceinline__ void bring_next(Shared& shared, const lla::Call& call, const Maps& maps, int free, int tiles) {
  const int thread = thread_index() % 128, warp = thread / 32, lane = thread % 32, next = free + SLOTS;
  if (warp >= COPYING_WARPS || free < 0 || next >= tiles) return;
  mbarrier_wait(shared_address(&shared.x_empty[free % SLOTS]), free / SLOTS & 1);
  if (lane < BOXES) bring(shared, call, maps, warp, next, lane);
  __syncwarp();
}

// The barriers of a pass, by a warp. They follow one another.
__device__ __forceinline__ void begin_pass(Shared& shared, int lane) {
  constexpr int BARRIERS = 3 * SLOTS + SCORE_STAGES;
  static_assert(BARRIERS <= 32);
  if (lane < BARRIERS)
    mbarrier_init(shared_address(&shared.raw_full[0]) + 8 * lane, lane < SLOTS       ? COPYING_WARPS * BOXES
                                                                  : lane < 2 * SLOTS ? GROUP_WARPS
                                                                  : lane < 3 * SLOTS ? MATRIX_WARPGROUPS
                                                                                     : 4);
  fence_mbarrier_init();
  if (lane < 2) shared.inverse_scale[lane] = 1.0f, shared.largest[lane] = 0;
  if (lane == 0) shared.out_of_range = shared.bad_page = 0;
}

// No one waits on them any more; by a warp.
__device__ __forceinline__ void end_pass(Shared& shared, int lane) {
  if (lane < 3 * SLOTS + SCORE_STAGES) mbarrier_invalidate(shared_address(&shared.raw_full[0]) + 8 * lane);
  __syncwarp();
}
