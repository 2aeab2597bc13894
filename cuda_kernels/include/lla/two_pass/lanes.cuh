#pragma once
// How the keys of a tile lie over the warps and their lanes: 8 channels, 16 bytes, of 4 keys a lane.

#include "lla/two_pass/shape.cuh"

constexpr int LANE_KEYS = 4, SUB_KEYS = 2;
static_assert(WARPS * SUB_KEYS * LANE_KEYS == TILE && 32 / SUB_KEYS * 8 == D);

struct Lane {
  int chunk, first_key;  // first_key: in a tile

  // Half of the lanes take keys 4 further on: so 8 lanes fall on different banks.
  __device__ __forceinline__ explicit Lane(int thread)
      : chunk(thread % 32 / 4 * 2 + thread % 2), first_key((thread / 32 * SUB_KEYS + thread / 2 % 2) * LANE_KEYS) {}

  __device__ __forceinline__ bool is_first() const { return first_key % 8 == 0; }  // of those of a chunk
  __device__ __forceinline__ int column() const { return chunk * 8; }

  // In a slot, of the lane's first key; at_key has the others.
  __device__ __forceinline__ unsigned place() const {
    return chunk / 8 * RUN + first_key * 128 + ((chunk ^ first_key) % 8 << 4);
  }
};

__device__ __forceinline__ unsigned at_key(unsigned first, int key) { return (first ^ key << 4) + key * 128; }

// Adds what the lanes of a chunk have of their keys.
__device__ __forceinline__ float of_all_keys(float x) { return x + __shfl_xor_sync(~0u, x, 2); }

// To lie in shared memory, the sums of all keys of a warp.
__device__ __forceinline__ void stage(float (&to)[WARPS][D], const Lane& at, int thread, const float (&sums)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float sum = of_all_keys(sums[e]);
    if (at.is_first()) to[thread / 32][at.column() + e] = sum;
  }
}

// What all warps staged.
__device__ __forceinline__ float staged_sum(const Shared& shared, int which, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += shared.staged[which][w][column];
  return sum;
}

__device__ __forceinline__ float staged_d1(const Shared& shared, int which) {
  float d1 = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) d1 += shared.warp_d1[which][w];
  return d1;
}

// What no one sees of a tile's keys, or of its values, becomes zeros: rows there may hold anything, and 0 times NaN is NaN. Each
// lane's own.
__device__ __forceinline__ void hide(const Lane& at, unsigned x, int first, int end) {
#pragma unroll 1
  for (int i = 0; i < LANE_KEYS; i++) {
    const int key = at.first_key + i;
    if (key < first || key >= end) shared_store4(at_key(x, i), {0, 0, 0, 0});
  }
}
