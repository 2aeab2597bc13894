#pragma once
// The steps of a warpgroup, whose warps multiply together: scores of the next step and sums of this one are on their way at the
// same time, while a slot that was read is filled again.

#include "ring.cuh"
#include "warp_weights.cuh"
#include "warpgroup_tile.cuh"
#include "warpgroup_weigh.cuh"

typedef WarpgroupTile Tile;

// The warpgroup's steps from `step` on, up to `end`, of an item.
__device__ __forceinline__ void take_steps(const Problem& p, const Item& item, const Rows& rows, Ring& ring, Tile& tile, Accumulator& a,
                                           int& step, int end, WarpsTold& warps_told, char* shared, int lane) {
  const int first_step = step;
  float c[HEADS][TILES][4];
  if (step < end)
    tile.scores(ring.wait(), c), tile.arrive(c, a.O1, a.O2);
  else
    warps_told.tell(shared, a, lane);
#pragma unroll 1
  for (; step < end; step += RINGS) {
    const int key = item.position(step);
    const bool masked = key < item.keys.first || key + STEP > item.keys.end;
    to_log2(c, p.scale_log2);
    if (masked) hide(a, c, key + Tile::key(lane), item.keys);
    Weighed weighed;
    const bool astray = weigh_as_agreed(a, c, weighed);
    tile.put(weighed.w, lane);
    char* values;
    if (masked) {
      values = ring.wait();
      clear_hidden(values, key, item.keys, threadIdx.x % 128);
    }
    fence_async_proxy();
    if (barrier_any(tile.barrier(), 128, astray)) agree_anew(a, c, weighed, tile, shared, lane);
    take(a, weighed);
    if (step + RINGS >= end) warps_told.tell(shared, a, lane);
    if (!masked) values = ring.wait();
    tile.accumulate(values, a.O1, a.O2);
    // All warps have read the values of the step before, and the keys.
    if (step > first_step) ring.release(p);
    ring.release(p);
    // Scores of nothing behind the last step: products that are not always there would be waited for one by one.
    tile.scores(step + RINGS < end ? ring.wait() : values, c);
    tile.arrive(c, a.O1, a.O2);
  }
  barrier_sync(tile.barrier(), 128);
  if (!SINGLE && step > first_step) ring.release(p);
}
