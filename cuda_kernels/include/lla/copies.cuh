#pragma once
// Keys and values from memory to the ring, by the copy engine: a run of them by a warp, a box of it by a lane. The first
// tiles are brought by transform warps, all others by those of the last matrix warpgroup, which have the time.
//
// The ring is not filled at once. All blocks begin together, and what they ask for comes in no order: the first tile would
// come with the last, and with it the instructions that the block has yet to fetch. So tiles are asked for as others come.

#include "lla/boxes.cuh"
#include "lla/shape.cuh"
#include "maps.cuh"
#include "ptx/mbarrier.cuh"

constexpr int COPYING_WARPS = 2 * RUNS;
static_assert(COPYING_WARPS <= 4);

// Where a block's keys come from, in registers: shared memory is slow to answer while the matrix units read it.
struct Source {
  int begin, end, batch, kv_head;

  __device__ __forceinline__ Source(int begin, int end, int batch, int kv_head) : begin(begin), end(end), batch(batch), kv_head(kv_head) {}
  __device__ __forceinline__ explicit Source(const Shared& shared)
      : Source(shared.begin, shared.end, shared.batch, shared.kv_head) {}
};

// What describes run `run` of a tile to the copy engine, and which run of its head it is.
__device__ __forceinline__ const TensorMap& map_of_run(const Maps& maps, int run) { return run < RUNS ? maps.v : maps.k; }
__device__ __forceinline__ constexpr int run_of_head(int run) { return column_of_place(run) % D / 64; }

// Brings a box of run `run` of a tile to its slot, and counts it where all of the tile's are waited for.
__device__ __forceinline__ void bring(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from,
                                      int run, int tile, int slot, int box) {
  const int position = from.begin + tile * TILE + box * BOX;
  const unsigned barrier = shared_address(&shared.raw_full[slot]);
  const Box found(call, from.batch, position, from.end, shared.bad_page);
  mbarrier_arrive_expect(barrier, found.present ? BOX * 128 : 0);
  if (!found.present) return;
  const unsigned to = shared_address(shared.ring[slot]) + run * RUN + box * BOX * 128;
  box_copy<READ_ONCE>(to, map_of_run(maps, run), 0, found.place, run_of_head(run), from.kv_head, found.outer, barrier);
}

// Tiles FIRST to LAST of a pass, each to the slot of its number; by COPYING_WARPS warps.
template <int FIRST, int LAST>
__device__ __forceinline__ void bring_tiles(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int tiles, int warp, int lane) {
  const int tile = FIRST + lane / BOXES;
  if (warp < COPYING_WARPS && tile < min(LAST, tiles)) bring(shared, call, maps, from, warp, tile, tile, lane % BOXES);
  __syncwarp();
}

// Tiles that are brought before the first one is there; as many keys with heads of 64, two blocks of which share a multiprocessor.
constexpr int AT_FIRST = D == 64 ? 2 : 1;
// And that are on their way at once then, until the ring is full.
constexpr int ON_THEIR_WAY = 2;
static_assert(D == 128 || AT_FIRST == ON_THEIR_WAY, "one more is asked for as each comes, from the first one on");

__device__ __forceinline__ void bring_first(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int tiles) {
  const int thread = thread_index() - MATRIX_THREADS;
  bring_tiles<0, AT_FIRST>(shared, call, maps, from, tiles, thread / 32, thread % 32);
}

// The first tiles of the row that a block takes after this one's, to the second-level cache: while rows are solved, the memory
// has nothing to do. By the transform warps.
__device__ __forceinline__ void prefetch_next(const lla::Call& call, const Maps& maps) {
  constexpr int TILES = 4;
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32;
  const int next = block_index() + call.blocks_at_once;
  if (PAGED || call.splits > 1 || next >= gridDim.x || warp >= COPYING_WARPS) return;
  const lla::Row row(call, next);
  const int position = row.first + lane * TILE;
  if (lane < TILES && position < row.end)
    box_prefetch(map_of_run(maps, warp), 0, position, run_of_head(warp), row.kv_head, row.batch);
}

// Tiles of a row that are asked for while the row before is solved, at first: the others one by one as these come, in their order.
constexpr int EARLY_AT_FIRST = 2;

#ifdef FOR_RACECHECK
constexpr int BARRIERS = 3 * SLOTS + SCORE_STAGES + 2;
#else
constexpr int BARRIERS = 3 * SLOTS + SCORE_STAGES;
#endif

// Every `step`-th of the barriers of a pass, which follow one another: those of what is brought are the first SLOTS; by a thread.
__device__ __forceinline__ void begin_barriers(Shared& shared, int first, int end, int step) {
#pragma unroll 1
  for (int b = first; b < end; b += step)
    mbarrier_init(shared_address(&shared.raw_full[0]) + 8 * b, b < SLOTS       ? COPYING_WARPS * BOXES
                                                               : b < 2 * SLOTS ? GROUP_WARPS * OF_WARP
                                                               : b < 3 * SLOTS ? MATRIX_WARPGROUPS * OF_WARPGROUP
                                                               : b < 3 * SLOTS + SCORE_STAGES ? 4 * OF_WARP
                                                                                              : TRANSFORM_WARPS * OF_WARP);
  fence_mbarrier_init();
}

// The same of barriers that no one waits on any more.
__device__ __forceinline__ void renew_barriers(Shared& shared, int first, int end, int step) {
#pragma unroll 1
  for (int b = first; b < end; b += step) mbarrier_invalidate(shared_address(&shared.raw_full[0]) + 8 * b);
  begin_barriers(shared, first, end, step);
}

// The rest of what a pass begins with, but for what is found as its tiles are asked for.
__device__ __forceinline__ void begin_pass(Shared& shared) {
  shared.inverse_scale[0] = shared.inverse_scale[1] = 1.0f, shared.largest[0] = shared.largest[1] = 0;
  shared.out_of_range = 0;
}

// No one waits on them any more; by a warp.
__device__ __forceinline__ void end_pass(Shared& shared, int lane) {
  static_assert(BARRIERS <= 32);
  if (lane < BARRIERS) mbarrier_invalidate(shared_address(&shared.raw_full[0]) + 8 * lane);
  __syncwarp();
}
