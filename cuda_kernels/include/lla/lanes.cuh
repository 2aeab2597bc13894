#pragma once
// How the keys of a tile lie over the lanes of a warp: 8 channels of K or V, 16 bytes, of 8 keys a lane.

#include "lla/shape.cuh"

constexpr int CHUNKS = 2 * D / 8;  // of a key
constexpr int LANE_KEYS = 8;
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

  __device__ __forceinline__ unsigned raw(Shared& shared, int warp) const {
    return shared_address(shared.raw[warp]) + ((is_value() ? WARP_KEYS : 0) + 4 * sub_key) * RAW_PITCH + channel() * 2;
  }

  __device__ __forceinline__ unsigned x(Shared& shared, int warp) const {
    return shared_address(shared.x) + chunk / 8 * X_BLOCK + (warp * WARP_KEYS + 4 * sub_key) * 128 +
           ((chunk ^ 4 * sub_key) % 8 << 4);
  }
};

// Where a lane's 16 bytes of keys lie.
struct Cache {
  const lla::Call& call;
  const half_bits* first;
  const long long* stride;
  int batch;

  __device__ __forceinline__ Cache(const lla::Call& call, const lla::Row& row, const Lane& lane)
      : call(call), stride(lane.is_value() ? call.v_stride : call.k_stride), batch(row.batch) {
    first = static_cast<const half_bits*>(lane.is_value() ? call.v : call.k) + row.kv_head * stride[2] + lane.channel();
  }

  // Null for a key on a page outside the cache.
  __device__ __forceinline__ const half_bits* of_key(int key) const {
    const lla::Place place(call, batch, key);
    return place.valid ? first + place.outer * stride[0] + place.inner * stride[1] : nullptr;
  }
};
