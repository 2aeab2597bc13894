#pragma once
// The transform warps: X = sqrt(p) (k - k0 | v - v0) of every tile, rounded once to float16, and the sums of weighted
// keys and values. Those are taken of the same rounded X, so that rounding cancels in the covariances.
//
// The origin is the weighted mean of what was seen when the maximum last grew. It must be near the final mean: the
// tensor cores truncate when they accumulate, and far from the mean that bias is larger than the covariances.
//
// float16 keeps 11 bits where bfloat16 keeps 8, in a range that keys and values may leave: a power of two scales X, of
// the first tile's largest number. Where a later one is more than 128 times that, the sums come out infinite, and the
// block takes its keys again with the largest of all.

#include "lla/lanes.cuh"
#include "ptx/mbarrier.cuh"
#include "lla/shape.cuh"

// Adds what the lanes of a chunk have of their keys.
__device__ __forceinline__ float of_all_keys(float x) {
  return SUB_KEYS == 1 ? x : x + __shfl_xor_sync(~0u, x, 2);
}

// To lie in shared memory, the sums of all keys of a warp.
__device__ __forceinline__ void stage(float (&to)[2 * D], const Lane& at, const float (&sums)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float sum = of_all_keys(sums[e]);
    if (at.sub_key == 0) to[at.column() + e] = sum;
  }
}

__device__ __forceinline__ float largest_of(uint4 raw) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float2 x = widen_pair<BFLOAT>(words[e]);
    // Neither NaN nor an infinity, which no scale saves.
    if (fabsf(x.x) < -minus_infinity()) largest = fmaxf(largest, fabsf(x.x));
    if (fabsf(x.y) < -minus_infinity()) largest = fmaxf(largest, fabsf(x.y));
  }
  return largest;
}

// The power of two that scales the largest number of all lanes to between 2^exponent and twice that, or `otherwise`
// if that is 0. By all transform warps.
__device__ __forceinline__ float agreed_scale(Shared& shared, const Lane& at, float largest, int exponent,
                                              float otherwise) {
#pragma unroll
  for (int kind = 0; kind < 2; kind++) {
    const unsigned of_warp = __reduce_max_sync(~0u, at.is_value() == kind ? __float_as_uint(largest) : 0);
    if (thread_index() % 32 == 0) atomicMax(&shared.largest[kind], of_warp);
  }
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  const int bits = shared.largest[at.is_value()];
  // The exponent of the scale; that of its inverse is 254 less it.
  const int power = min(254 + exponent - (bits >> 23), 127 + 100);
  // Others read it after a barrier at least.
  if (thread_index() < MATRIX_THREADS + 32 && at.sub_key == 0 && at.channel() == 0)
    shared.inverse_scale[at.is_value()] = bits ? __uint_as_float(254 - power << 23) : 1.0f / otherwise;
  return bits ? __uint_as_float(power << 23) : otherwise;
}

// Moves the origin to the weighted mean of the keys before this tile and in it, by all transform warps; the sums,
// relative to the old origin and maximum, follow. Rare: the maximum grew by a factor of 2^LAZY_LOG2.
__device__ __forceinline__ void recentre(Shared& shared, const Lane& at, unsigned from, const float (&roots)[LANE_KEYS],
                                         float rescale, float scale, float (&sums)[8], float (&origin)[8], float& d1) {
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32;
  stage(shared.staged[warp], at, sums);
  const float warp_d1 = of_all_keys(d1);
  if (lane == 0) shared.warp_d1[warp] = warp_d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  float before = 0.0f, d1_before = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) {
    before += shared.staged[w][thread];
    d1_before += shared.warp_d1[w];
  }
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  {
    float tile_sums[8] = {}, tile_d1 = 0.0f;
#pragma unroll
    for (int key = 0; key < LANE_KEYS; key++) {
      const float weight = roots[key] * roots[key];
      const uint4 raw = shared_load4(from + key_of(key) * RAW_PITCH);
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 x = widen_pair<BFLOAT>(words[e]);
        tile_sums[2 * e] += weight * (x.x - origin[2 * e]);
        tile_sums[2 * e + 1] += weight * (x.y - origin[2 * e + 1]);
      }
      tile_d1 += weight;
    }
#pragma unroll
    for (int e = 0; e < 8; e++) tile_sums[e] *= scale;
    stage(shared.staged[warp], at, tile_sums);
    tile_d1 = of_all_keys(tile_d1);
    if (lane == 0) shared.warp_d1[warp] = tile_d1;
  }
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  float sum = rescale * before, weight = rescale * d1_before;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) {
    sum += shared.staged[w][thread];
    weight += shared.warp_d1[w];
  }
  const float shift = sum / weight;
  shared.shift[thread] = shift;
  shared.moved_sums[thread] = before;
  shared.sums.origin[thread] += shift * shared.inverse_scale[thread / D];
  if (thread == 0) shared.moved_d1 = d1_before;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const int column = at.column() + e;
    origin[e] = shared.sums.origin[column];
    // The lanes of a chunk have sums of other keys; each moves by its own.
    sums[e] = rescale * (sums[e] - d1 * shared.shift[column]);
  }
  d1 *= rescale;
}

// One pass over the tiles. Leaves the sums, about their origin, in shared.sums.
__device__ __forceinline__ void weigh(Shared& shared, const lla::Call& call, const lla::Row& row, int begin, int keys,
                                      int tiles) {
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32;
  const Lane at(lane);
  const unsigned raw_chunk = at.raw(shared, warp), x_chunk = at.x(shared, warp);

  float scale = 1.0f;
  const bool exact = shared.exact;
  if (exact) {
    const Cache cache(call, row, at);
    float largest = 0.0f;
#pragma unroll 1
    for (int key = begin + warp * SUB_KEYS + at.sub_key; key < begin + keys; key += TRANSFORM_WARPS * SUB_KEYS) {
      const half_bits* from = cache.of_key(key);
      if (from) largest = fmaxf(largest, largest_of(__ldg(reinterpret_cast<const uint4*>(from))));
    }
    // A weight's root is at most 16, and a number at most twice the largest from the origin.
    scale = agreed_scale(shared, at, largest, 9, 1.0f);
  }

  float origin[8] = {};
  float m = minus_infinity(), d1 = 0.0f;
  float sums[8] = {};
  for (int tile = 0; tile < tiles; tile++) {
    const int stage = tile % X_STAGES, score_stage = tile % SCORE_STAGES;
    mbarrier_wait(shared_address(&shared.scores_full[score_stage]), tile / SCORE_STAGES & 1);
    float roots[LANE_KEYS];
#pragma unroll
    for (int four = 0; four < LANE_KEYS; four += 4) {
      const float4 s = *reinterpret_cast<const float4*>(
          &shared.scores[score_stage][warp * WARP_KEYS + 4 * at.sub_key + key_of(four)]);
      roots[four] = s.x, roots[four + 1] = s.y, roots[four + 2] = s.z, roots[four + 3] = s.w;
    }
    float tile_max = minus_infinity();
#pragma unroll
    for (int w = 0; w < TRANSFORM_WARPS; w += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.maxima[score_stage][w]);
      tile_max = fmaxf(tile_max, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
    }
    const unsigned from = raw_chunk + tile % SLOTS * RAW_SLOT;
    const bool grown = tile_max > m + LAZY_LOG2;
    const float rescale = grown ? exp2_fast(m - tile_max) : 1.0f;
    if (grown && m == minus_infinity() && !exact) {
      float largest = 0.0f;
#pragma unroll
      for (int key = 0; key < LANE_KEYS; key++)
        largest = fmaxf(largest, largest_of(shared_load4(from + key_of(key) * RAW_PITCH)));
      // Zeros alone say nothing of the scale, and make what follows NaN.
      scale = agreed_scale(shared, at, largest, 3, 0.0f);
    }
    if (grown) m = tile_max;
    const float half_shift = m == minus_infinity() ? 0.0f : 0.5f * m;
#pragma unroll
    for (int key = 0; key < LANE_KEYS; key++) roots[key] = exp2_fast(0.5f * roots[key] - half_shift);
    if (grown) {
      // The moments follow this shift when this tile reaches them, so all before it must have.
      if (tile > 0)
        mbarrier_wait(shared_address(&shared.x_empty[(tile - 1) % X_STAGES]), (tile - 1) / X_STAGES & 1);
      recentre(shared, at, from, roots, rescale, scale, sums, origin, d1);
    }
#pragma unroll
    for (int key = 0; key < LANE_KEYS; key++) d1 += roots[key] * roots[key];

    if (tile >= X_STAGES) mbarrier_wait(shared_address(&shared.x_empty[stage]), (tile / X_STAGES - 1) & 1);
    unsigned to = x_chunk + stage * X_STAGE;
    // Or the addresses of all keys would be kept over the loop.
    make_opaque(to);
#pragma unroll
    for (int first = 0; first < LANE_KEYS; first += 4) {
      // Loads of four keys before their stores: the compiler may not move a load across a store.
      uint4 raws[4];
#pragma unroll
      for (int i = 0; i < 4; i++) raws[i] = shared_load4(from + key_of(first + i) * RAW_PITCH);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float root = roots[first + i], factor = root * scale;
        const unsigned words[4] = {raws[i].x, raws[i].y, raws[i].z, raws[i].w};
        unsigned rounded[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 x = widen_pair<BFLOAT>(words[e]);
          rounded[e] = narrow_pair<false>((x.x - origin[2 * e]) * factor, (x.y - origin[2 * e + 1]) * factor);
          const float2 weighted = widen_pair<false>(rounded[e]);
          sums[2 * e] += root * weighted.x, sums[2 * e + 1] += root * weighted.y;
        }
        const int key = key_of(first + i);
        shared_store4((to ^ key % 8 << 4) + key * 128, {rounded[0], rounded[1], rounded[2], rounded[3]});
      }
    }
    if (thread == 0) shared.rescale[stage] = rescale;
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.x_full[stage]));
  }

  stage(shared.staged[warp], at, sums);
  d1 = of_all_keys(d1);
  if (lane == 0) shared.warp_d1[warp] = d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) sum += shared.staged[w][thread];
  sum *= shared.inverse_scale[thread / D];
  shared.sums.x[thread] = sum;
  if (!(fabsf(sum) < -minus_infinity())) atomicMax(&shared.out_of_range, 1);
  if (thread == 0) {
    float sum = 0.0f;
    for (int w = 0; w < TRANSFORM_WARPS; w++) sum += shared.warp_d1[w];
    shared.sums.d1 = shared.bad_page ? quiet_nan() : sum;
    shared.sums.m = m;
  }
}
