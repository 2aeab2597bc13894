#pragma once
// The transform warps: X = sqrt(p) (k - k0 | v - v0) of every tile, rounded once to float16, in place of the tile, and
// the sums of weighted keys and values. Those are taken of the same rounded X, so that rounding cancels in the
// covariances.
//
// The origin is the weighted mean of what was seen when the maximum last grew. It must be near the final mean: the
// tensor cores truncate when they accumulate, and far from the mean that bias is larger than the covariances.
//
// float16 keeps 11 bits where bfloat16 keeps 8, in a range that keys and values may leave: a power of two scales X, of
// the first tile's largest number. Where a later one is more than 128 times that, the sums come out infinite, and the
// block takes its keys again with the largest of all.

#include "lla/lanes.cuh"
#include "lla/shape.cuh"
#include "ptx/mbarrier.cuh"

// What a lane takes of a tile at a time, for want of registers.
constexpr int KEYS_AT_ONCE = 4;
static_assert((key_of(KEYS_AT_ONCE - 1) & key_of(KEYS_AT_ONCE)) == 0, "places are found by exclusive or");

// Of a key's weight.
__device__ __forceinline__ float root_of(float score, float half_shift) { return exp2_fast(0.5f * score - half_shift); }

// Adds what the lanes of a chunk have of their keys.
__device__ __forceinline__ float of_all_keys(float x) {
  return SUB_KEYS == 1 ? x : x + __shfl_xor_sync(~0u, x, 2);
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

// To lie in shared memory, the sums of all keys of a warp.
__device__ __forceinline__ void stage(float (&to)[2 * D], const Lane& at, const float (&sums)[8]) {
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float sum = of_all_keys(sums[e]);
    if (at.sub_key == 0) to[at.column() + e] = sum;
  }
}

// Makes the largest number of a warp's lanes known, of keys and of values.
__device__ __forceinline__ void note_largest(Shared& shared, const Lane& at, float largest) {
#pragma unroll
  for (int kind = 0; kind < 2; kind++) {
    const unsigned of_warp = __reduce_max_sync(~0u, at.is_value() == kind ? __float_as_uint(largest) : 0);
    if (thread_index() % 32 == 0) atomicMax(&shared.largest[kind], of_warp);
  }
}

// The power of two that scales the largest number of all warps to between 2^exponent and twice that, or `otherwise` if
// that is 0; after a barrier.
__device__ __forceinline__ float agreed_scale(Shared& shared, int kind, int exponent, float otherwise) {
  const int bits = shared.largest[kind];
  // The exponent of the scale; that of its inverse is 254 less it.
  const int power = min(254 + exponent - (bits >> 23), 127 + 100);
  // Others read it after a barrier at least.
  if (thread_index() - MATRIX_THREADS == kind * D) shared.inverse_scale[kind] = bits ? __uint_as_float(254 - power << 23) : 1.0f / otherwise;
  return bits ? __uint_as_float(power << 23) : otherwise;
}

// Moves the origin to the weighted mean of the keys before this tile and in it, by all transform warps; the sums,
// relative to the old origin and maximum, follow. Rare: the maximum grew by a factor of 2^LAZY_LOG2. The first time,
// unless the scale of X is there, it is chosen too. own: whether the tile is that of this warp's group; its scores and
// shift say what the keys weigh.
__device__ __forceinline__ void recentre(Shared& shared, bool own, unsigned from, const float* scores, float half_shift,
                                         float rescale, int move, bool choose, float& scale, float (&sums)[8], float (&origin)[8], float& d1) {
  float tile_sums[8] = {}, tile_d1 = 0.0f;
  float largest = 0.0f;
#pragma unroll 4
  for (int key = 0; own && key < LANE_KEYS; key++) {
    const float root = root_of(scores[key_of(key)], half_shift), weight = root * root;
    const uint4 raw = shared_load4(at_key(from, key));
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = widen_pair<BFLOAT>(words[e]);
      tile_sums[2 * e] += weight * (x.x - origin[2 * e]);
      tile_sums[2 * e + 1] += weight * (x.y - origin[2 * e + 1]);
    }
    tile_d1 += weight;
    if (choose) largest = fmaxf(largest, largest_of(raw));
  }
  // Anew: what is used here alone costs registers elsewhere.
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32, kind = thread / D;
  const Lane at(lane);
  // The sums before this tile, and those of the tile, in units of keys and values.
  stage(shared.staged[0][warp], at, sums);
  stage(shared.staged[1][warp], at, tile_sums);
  const float d1_of_warp = of_all_keys(d1);
  tile_d1 = of_all_keys(tile_d1);
  if (lane == 0) shared.warp_d1[0][warp] = d1_of_warp, shared.warp_d1[1][warp] = tile_d1;
  if (choose) note_largest(shared, at, largest);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  float before = 0.0f, sum = 0.0f, d1_before = 0.0f, d1_now = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) {
    before += shared.staged[0][w][thread];
    sum += shared.staged[1][w][thread];
    d1_before += shared.warp_d1[0][w];
    d1_now += shared.warp_d1[1][w];
  }
  // Zeros alone say nothing of the scale, and make what follows NaN.
  const float column_scale = choose ? agreed_scale(shared, kind, 3, 0.0f) : 1.0f / shared.inverse_scale[kind];
  if (choose) scale = agreed_scale(shared, at.is_value(), 3, 0.0f);
  const float weight = rescale * d1_before + d1_now;
  const float shift = (rescale * before + column_scale * sum) / weight;
  auto& moved = shared.moved[move];
  moved.shift[thread] = shift;
  moved.sums[thread] = before;
  shared.origin[thread] += shift / column_scale;
  if (thread == 0) moved.d1 = d1_before;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const int column = at.column() + e;
    origin[e] = shared.origin[column];
    // The lanes of a chunk have sums of other keys; each moves by its own.
    sums[e] = rescale * (sums[e] - d1 * moved.shift[column]);
  }
  d1 *= rescale;
}

// The largest number of the block's keys and values.
__device__ __forceinline__ float largest_of_all(const Shared& shared, const lla::Call& call, const Lane& at, int warp) {
  const long long(&stride)[3] = at.is_value() ? call.v_stride : call.k_stride;
  const half_bits* first = static_cast<const half_bits*>(at.is_value() ? call.v : call.k) + at.channel();
  float largest = 0.0f;
#pragma unroll 1
  for (int key = shared.first + warp * SUB_KEYS + at.sub_key; key < shared.end; key += TRANSFORM_WARPS * SUB_KEYS) {
    const lla::Place place(call, shared.batch, key);
    if (!place.valid) continue;
    const half_bits* from = first + place.offset(stride, shared.kv_head);
    largest = fmaxf(largest, largest_of(__ldg(reinterpret_cast<const uint4*>(from))));
  }
  return largest;
}

// The sums of all warps, at the end.
__device__ __forceinline__ void leave_sums(Shared& shared, const float (&sums)[8], float d1, float m) {
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32;
  stage(shared.staged[0][warp], Lane(lane), sums);
  d1 = of_all_keys(d1);
  if (lane == 0) shared.warp_d1[0][warp] = d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) sum += shared.staged[0][w][thread];
  sum *= shared.inverse_scale[thread / D];
  shared.sums[thread] = sum;
  if (!(fabsf(sum) < -minus_infinity())) atomicMax(&shared.out_of_range, 1);
  if (thread == 0) {
    float sum = 0.0f;
    for (int w = 0; w < TRANSFORM_WARPS; w++) sum += shared.warp_d1[0][w];
    shared.own.d1 = shared.bad_page ? quiet_nan() : sum;
    shared.own.m = m;
  }
}

// The largest score of a tile, in every lane; NaN is none.
__device__ __forceinline__ float largest_score(const float* scores) {
  const float2 pair = reinterpret_cast<const float2*>(scores)[thread_index() % 32];
  // Integers of the same order, of which the lanes find the largest in one instruction.
  const int bits = __float_as_int(fmaxf(fmaxf(minus_infinity(), pair.x), pair.y));
  const int largest = __reduce_max_sync(~0u, bits < 0 ? bits ^ 0x7fffffff : bits);
  return __int_as_float(largest < 0 ? largest ^ 0x7fffffff : largest);
}

// One pass over the tiles. Leaves the sums about the origin in shared.sums, their weight and the maximum in shared.own.
__device__ __forceinline__ void weigh(Shared& shared, const lla::Call& call, int tiles) {
  const int thread = thread_index() - MATRIX_THREADS, lane = thread % 32;
  const int group = thread / 32 / GROUP_WARPS, warp = thread / 32 % GROUP_WARPS;
  const Lane at(lane);
  const unsigned ring = shared_address(shared.ring) + at.place(warp);
  const int first_key = warp * WARP_KEYS + 4 * at.sub_key;  // of the lane, in a tile

  float scale = 1.0f;
  const bool exact = shared.exact;
  if (exact) {
    note_largest(shared, at, largest_of_all(shared, call, at, thread / 32));
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
    // A weight's root is at most 16, and a number at most twice the largest from the origin.
    agreed_scale(shared, thread / D, 9, 1.0f);
    scale = agreed_scale(shared, at.is_value(), 9, 1.0f);
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  }

  float origin[8] = {}, sums[8] = {};
  float m = minus_infinity(), d1 = 0.0f;
  int move = 0;
  // The largest score of a tile grew the maximum: with that and the origin moves what the group has summed up. Returns
  // what brings sums to the new maximum.
  const auto grow = [&](int tile, float largest, bool own, unsigned x) {
    const float rescale = exp2_fast(m - largest);
    const bool choose = m == minus_infinity() && !exact;
    m = largest;
    // The moments follow a shift when its tile reaches them. The last but one, in whose place this comes, was of a tile
    // two before at least.
    if (tile >= 2) mbarrier_wait(shared_address(&shared.x_empty[(tile - 2) % SLOTS]), (tile - 2) / SLOTS & 1);
    const float* scores = &shared.scores[tile % SCORE_STAGES][first_key];
    recentre(shared, own, x, scores, 0.5f * m, rescale, move, choose, scale, sums, origin, d1);
    move ^= 1;
    return rescale;
  };
  const auto has_grown = [&](float largest) { return largest > m + LAZY_LOG2; };
  const auto wait_for_scores = [&](int tile) {
    mbarrier_wait(shared_address(&shared.scores_full[tile % SCORE_STAGES]), tile / SCORE_STAGES & 1);
  };

  int tile = group;
#pragma unroll 1
  for (; tile < tiles; tile += GROUPS) {
    delay();
    // Those of the tile before, which the other group has, were taken before.
    wait_for_scores(tile);
    const float largest = largest_score(shared.scores[tile % SCORE_STAGES]);
    const float largest_before = tile > 0 ? largest_score(shared.scores[(tile - 1) % SCORE_STAGES]) : minus_infinity();
    if (has_grown(largest_before)) grow(tile - 1, largest_before, false, 0);
    const int slot = tile % SLOTS;
    unsigned x = ring + slot * SLOT;
    const int first_of_tile = shared.begin + tile * TILE;
    if (first_of_tile < shared.first || first_of_tile + TILE > shared.end) {
      // Rows that no one sees may hold anything, and a weight of 0 times NaN is NaN.
#pragma unroll 1
      for (int i = 0; i < LANE_KEYS; i++) {
        const int key = first_of_tile + first_key + key_of(i);
        if (key < shared.first || key >= shared.end) shared_store4(at_key(x, i), {0, 0, 0, 0});
      }
    }
    const float rescale = has_grown(largest) ? grow(tile, largest, true, x) : 1.0f;
    const float half_shift = m == minus_infinity() ? 0.0f : 0.5f * m;
    const float* scores = &shared.scores[tile % SCORE_STAGES][first_key];
#pragma unroll 1
    for (int keys = 0; keys < LANE_KEYS; keys += KEYS_AT_ONCE) {
      float roots[KEYS_AT_ONCE];
#pragma unroll
      for (int four = 0; four < KEYS_AT_ONCE; four += 4) {
        const float4 s = *reinterpret_cast<const float4*>(scores + key_of(four));
        roots[four] = root_of(s.x, half_shift), roots[four + 1] = root_of(s.y, half_shift);
        roots[four + 2] = root_of(s.z, half_shift), roots[four + 3] = root_of(s.w, half_shift);
      }
#pragma unroll
      for (int key = 0; key < KEYS_AT_ONCE; key++) d1 += roots[key] * roots[key];
      // Or the addresses of all keys would be kept over the loop.
      make_opaque(x);
      // All loads before the stores: the compiler may not move a load across a store.
      uint4 raws[KEYS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < KEYS_AT_ONCE; i++) raws[i] = shared_load4(at_key(x, i));
      // Or each would be loaded where it is used, and waited for there.
      __syncwarp();
#pragma unroll
      for (int i = 0; i < KEYS_AT_ONCE; i++) {
        const float root = roots[i], factor = root * scale;
        const unsigned words[4] = {raws[i].x, raws[i].y, raws[i].z, raws[i].w};
        unsigned rounded[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 raw = widen_pair<BFLOAT>(words[e]);
          rounded[e] = narrow_pair<false>((raw.x - origin[2 * e]) * factor, (raw.y - origin[2 * e + 1]) * factor);
          const float2 weighted = widen_pair<false>(rounded[e]);
          sums[2 * e] += root * weighted.x, sums[2 * e + 1] += root * weighted.y;
        }
        shared_store4(at_key(x, i), {rounded[0], rounded[1], rounded[2], rounded[3]});
      }
      x = at_key(x, KEYS_AT_ONCE), scores += key_of(KEYS_AT_ONCE);
    }
    if (lane == 0 && warp == 0) shared.rescale[slot] = rescale;
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.x_full[slot]));
  }
  if (tile == tiles && tiles > 0) {
    wait_for_scores(tile - 1);
    const float largest = largest_score(shared.scores[(tile - 1) % SCORE_STAGES]);
    if (has_grown(largest)) grow(tile - 1, largest, false, 0);
  }

  leave_sums(shared, sums, d1, m);
}
