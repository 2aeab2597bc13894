#pragma once
// How the keys of a tile lie over the lanes of a warp where an origin is found: 8 channels of K or V, 16 bytes, of 16 keys a lane.

#include "lla/shape.cuh"

constexpr int CHUNKS = 2 * D / 8;  // of a key
constexpr int LANE_KEYS = 16;
// With heads of 64, half of the lanes take other keys, 4 further on: so 8 lanes fall on different banks.
constexpr int SUB_KEYS = 32 / CHUNKS;
static_assert(WARP_KEYS == LANE_KEYS * SUB_KEYS);

// Key number `key` of a lane, before its own offset of 4 sub_key.
__device__ __forceinline__ constexpr int key_of(int key) { return SUB_KEYS == 1 ? key : key / 4 * 8 + key % 4; }

struct Lane {
  int chunk, sub_key;

  __device__ __forceinline__ explicit Lane(int lane)
      : chunk(SUB_KEYS == 1 ? lane : lane / 4 * 2 + lane % 2), sub_key(SUB_KEYS == 1 ? 0 : lane / 2 % 2) {}

  __device__ __forceinline__ bool is_value() const { return chunk >= CHUNKS / 2; }
  // Of the first of its channels, in a row of K and V.
  __device__ __forceinline__ int column() const { return chunk * 8; }
  __device__ __forceinline__ int channel() const { return chunk % (CHUNKS / 2) * 8; }

  // In a slot, of the lane's first key; at_key has the others.
  __device__ __forceinline__ unsigned place(int warp) const {
    return place_of_run(is_value(), channel() / 64) * RUN + (warp * WARP_KEYS + 4 * sub_key) * 128 +
           ((chunk ^ 4 * sub_key) % 8 << 4);
  }
};

__device__ __forceinline__ unsigned at_key(unsigned first, int key) {
  return (first ^ key_of(key) % 8 << 4) + key_of(key) * 128;
}
