#pragma once
// How keys and values come to the ring by the copy engine, a box of one run by a lane of the last warp.

#include "begin_barriers.cuh"
#include "lla/boxes.cuh"
#include "lla/two_pass/shape.cuh"
#include "maps.cuh"

// Whether this is the warp that brings tiles.
__device__ __forceinline__ bool brings() { return __shfl_sync(~0u, thread_index() / 32, 0) == WARPS - 1; }

// Of the ring: where the next load goes, or comes from.
struct Position {
  unsigned slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ unsigned slot_address(const Shared& shared, unsigned slot) { return shared_address(shared.ring) + slot * SLOT; }

__device__ __forceinline__ void wait_for_load(const Shared& shared, const Position& at) {
  delay();
  mbarrier_wait(shared_address(&shared.full[at.slot]), at.parity);
}

// What a lane brings of a tile.
__device__ __forceinline__ Box box_of_lane(Shared& shared, const lla::Call& call, const Source& from, int tile, int lane) {
  return Box(call, from.batch, from.position(tile) + lane % BOXES * BOX, from.end, shared.bad_page);
}

// Brings a tile of keys, or of values, to a slot; by a warp.
__device__ __forceinline__ void bring(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int tile, bool values, unsigned slot, int lane) {
  if (lane < LOAD_LANES) {
    const int run = lane / BOXES, box = lane % BOXES;
    const unsigned barrier = shared_address(&shared.full[slot]);
    const Box found = box_of_lane(shared, call, from, tile, lane);
    mbarrier_arrive_expect(barrier, found.present ? BOX * 128 : 0);
    if (found.present) {
      const unsigned to = slot_address(shared, slot) + run * RUN + box * BOX * 128;
      box_copy<false>(to, values ? maps.v : maps.k, 0, found.place, run, from.kv_head, found.outer, barrier);
    }
  }
  __syncwarp();
}

// Brings a tile of values as far as the second-level cache; by a warp.
__device__ __forceinline__ void prefetch_values(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int tile, int lane) {
  if (lane < LOAD_LANES) {
    const Box found = box_of_lane(shared, call, from, tile, lane);
    if (found.present) box_prefetch(maps.v, 0, found.place, lane / BOXES, from.kv_head, found.outer);
  }
  __syncwarp();
}

// Tiles of keys that are asked for before the first one is there. All blocks begin together, and what they ask for comes in no
// order: the first tile would come with the last.
constexpr int AT_FIRST = 1;
// And that are on their way at once then, until the ring is full.
constexpr int ON_THEIR_WAY = 2;

// Tiles FIRST to LAST of the keys, of which the first comes to position `to`; by a warp.
template <int FIRST, int LAST>
__device__ __forceinline__ void bring_tiles(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, Position to, int lane) {
#pragma unroll 1
  for (int tile = 0; tile < min(LAST, from.tiles); tile++, to.advance())
    if (tile >= FIRST) bring(shared, call, maps, from, tile, false, to.slot, lane);
}

// The loads of the second pass in their order: chunks of tiles, of each the keys, unless their X is there, and then the values. The
// first chunk is that of the last `kept` tiles.
struct Loads {
  int first, count, done = 0;  // of the chunk
  int rest;                    // the first tile of the next chunk
  int end;                     // of all but the first chunk
  bool values;
  Position to;

  __device__ __forceinline__ Loads(const Source& from, int kept, const Position& to)
      : first(kept ? from.tiles - kept : 0), count(kept ? kept : min(SLOTS, from.tiles)), rest(kept ? 0 : count), end(from.tiles - kept), values(kept), to(to) {}

  __device__ __forceinline__ bool any() const { return count > 0; }

  __device__ __forceinline__ void next_chunk() {
    first = rest, count = min(SLOTS, end - first), rest += count;
    values = false;
  }

  __device__ __forceinline__ void advance() {
    to.advance();
    if (++done < count) return;
    done = 0;
    if (values)
      next_chunk();
    else
      values = true;
  }

  // What is left of a chunk's values, to where they are near; by a warp.
  __device__ __forceinline__ void prefetch(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int lane) const {
#pragma unroll 1
    for (int i = done; i < count; i++) prefetch_values(shared, call, maps, from, first + i, lane);
  }

  // The next `number`, or all that are left; by a warp.
  __device__ __forceinline__ void bring_next(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, int number, int lane) {
#pragma unroll 1
    for (; number > 0 && any(); number--, advance()) bring(shared, call, maps, from, first + done, values, to.slot, lane);
  }
};
