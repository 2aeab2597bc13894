#pragma once
// How the keys of a tile lie over the warps and their lanes: 8 channels, 16 bytes, of two times 4 keys a lane.

#include "lla/two_pass/shape.cuh"

constexpr int SUB_KEYS = 2, LANE_KEYS = 4, GROUPS = 2, GROUP_KEYS = SUB_KEYS * LANE_KEYS;
static_assert(WARPS * GROUPS * GROUP_KEYS == TILE && 32 / SUB_KEYS * 8 == D && GROUP_KEYS == 8);

struct Lane {
  int chunk, first_key;  // first_key: in a tile

  // Half of the lanes take keys 4 further on: so 8 lanes fall on different banks.
  __device__ __forceinline__ explicit Lane(int thread)
      : chunk(thread % 32 / 4 * 2 + thread % 2), first_key(thread / 32 * GROUPS * GROUP_KEYS + thread / 2 % 2 * LANE_KEYS) {}

  __device__ __forceinline__ bool is_first() const { return first_key % GROUP_KEYS == 0; }  // of those of a chunk
  __device__ __forceinline__ int column() const { return chunk * 8; }

  // In a slot, of the lane's first key; at_key has the others of a group.
  __device__ __forceinline__ unsigned place() const {
    return chunk / 8 * RUN + first_key * 128 + ((chunk ^ first_key) % 8 << 4);
  }
};

__device__ __forceinline__ unsigned at_key(unsigned first, int key) { return (first ^ key << 4) + key * 128; }
__device__ __forceinline__ unsigned at_group(unsigned first, int group) { return first + group * GROUP_KEYS * 128; }

// Adds what the lanes of a chunk have of their keys.
__device__ __forceinline__ float of_all_keys(float x) { return x + __shfl_xor_sync(~0u, x, 2); }

// To lie in shared memory, the sums of all keys of a warp.
__device__ __forceinline__ void stage(Shared& shared, const Lane& at, int thread, const float (&sums)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float sum = of_all_keys(sums[e]);
    if (at.is_first()) shared.staged[thread / 32][at.column() + e] = sum;
  }
}

// What all warps staged.
__device__ __forceinline__ float staged_sum(const Shared& shared, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += shared.staged[w][column];
  return sum;
}

__device__ __forceinline__ float staged_d1(const Shared& shared) {
  float d1 = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) d1 += shared.warp_d1[w];
  return d1;
}

// What no one sees of a tile's keys, or of its values, becomes zeros: rows there may hold anything, and 0 times NaN is NaN. Each
// lane's own.
__device__ __forceinline__ void hide(const Lane& at, unsigned x, int first, int end) {
#pragma unroll 1
  for (int i = 0; i < GROUPS * LANE_KEYS; i++) {
    const int group = i / LANE_KEYS, key = at.first_key + group * GROUP_KEYS + i % LANE_KEYS;
    if (key < first || key >= end) shared_store4(at_key(at_group(x, group), i % LANE_KEYS), {0, 0, 0, 0});
  }
}
