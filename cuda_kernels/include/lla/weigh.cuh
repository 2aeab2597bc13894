#pragma once
// The transform warps: X = sqrt(p) (k - k0 | v - v0) of every tile, in float16, in place of the tile, and the sums of
// weighted keys and values. Those are taken of the same rounded roots and X, so that rounding cancels in the covariances.
// Pairs of float16 are subtracted and multiplied at once: k and k0 are exact in it, their difference and X are rounded.
//
// The origin is the weighted mean of what was seen when the maximum last grew. It must be near the final mean: the
// tensor cores truncate when they accumulate, and far from the mean that bias is larger than the covariances.
//
// float16 keeps 11 bits where bfloat16 keeps 8, in a range that keys and values may leave: a power of two scales them, of
// the first tile's largest number where that is far from 1. Where a later one is too large beside it, the sums come out
// infinite, and the block takes its keys again with the largest of all.

#include "lla/lanes.cuh"
#include "lla/scale.cuh"
#include "lla/shape.cuh"
#include "ptx/mbarrier.cuh"

// What a lane takes of a tile at a time, for want of registers; with heads of 64 and few rows more is faster, and slower with many.
constexpr int KEYS_AT_ONCE = D == 64 && TOGETHER ? 8 : 4;
static_assert((key_of(KEYS_AT_ONCE - 1) & key_of(KEYS_AT_ONCE)) == 0, "places are found by exclusive or");

// Adds what the lanes of a chunk have of their keys.
__device__ __forceinline__ float of_all_keys(float x) {
  return SUB_KEYS == 1 ? x : x + __shfl_xor_sync(~0u, x, 2);
}

// To lie in shared memory, the sums of all keys of a warp.
__device__ __forceinline__ void stage(float (&to)[2 * D], const Lane& at, const float (&sums)[8]) {
  float of_all[8];
#pragma unroll
  for (int e = 0; e < 8; e++) of_all[e] = of_all_keys(sums[e]);
  float4* const quads = reinterpret_cast<float4*>(&to[at.column()]);
  if (at.sub_key == 0) quads[0] = {of_all[0], of_all[1], of_all[2], of_all[3]}, quads[1] = {of_all[4], of_all[5], of_all[6], of_all[7]};
}

// Makes the largest number of a warp's lanes known, of keys and of values.
__device__ __forceinline__ void note_largest(Shared& shared, const Lane& at, float largest) {
#pragma unroll
  for (int kind = 0; kind < 2; kind++) {
    const unsigned of_warp = __reduce_max_sync(~0u, at.is_value() == kind ? __float_as_uint(largest) : 0);
    if (thread_index() % 32 == 0) atomicMax(&shared.largest[kind], of_warp);
  }
}

// Of a tile that the groups share, each key that this one takes: take(weight, words), 16 bytes of it. from, scores: of the tile,
// of this warp's keys.
template <class Weigh, class Take>
__device__ __forceinline__ void take_shared_keys(unsigned from, const float* scores, Weigh weight_of, Take take) {
  constexpr int KEYS = LANE_KEYS / GROUPS;
  static_assert(KEYS == 8, "at_key takes that many by exclusive or");
  const int first = (thread_index() - MATRIX_THREADS) / 32 / GROUP_WARPS * KEYS;
  from += key_of(first) * 128, scores += key_of(first);
#pragma unroll
  for (int four = 0; four < KEYS; four += 4) {
    const float4 s = *reinterpret_cast<const float4*>(scores + key_of(four));
    const float of_four[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int key = four; key < four + 4; key++) {
      const float weight = weight_of(of_four[key - four]);
      uint4 raw = shared_load4(at_key(from, key));
      // What no one sees may be anything.
      if (!(weight > 0.0f)) raw = {0, 0, 0, 0};
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
      take(weight, words);
    }
  }
}

// What all warps have of d1, and of a thread's column, as they staged it.
__device__ __forceinline__ float staged_d1(const Shared& shared, int which) {
  float d1 = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) d1 += shared.warp_d1[which][w];
  return d1;
}

__device__ __forceinline__ float staged_sum(const Shared& shared, int which, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) sum += shared.staged[which][w][column];
  return sum;
}

// The first origin of a pass and, unless it is there, the scale, when a maximum was first found in a tile: the weighted mean of
// that tile, by all transform warps, whosever it is. from, scores: of the tile, of this warp's keys. An origin need only be near
// the mean: a lane's few numbers are added up in pairs, in half precision; those of float16 in float, as sums may leave its range.
__device__ __forceinline__ void choose_origin(Shared& shared, unsigned from, const float* scores, float m, bool choose,
                                              float& scale, unsigned (&origin)[4]) {
  unsigned pairs[4] = {}, largest_pairs[4] = {};
  float sums[8] = {}, d1 = 0.0f;
  const auto weight_of = [&](float score) { return exp2_fast(score - m); };
  take_shared_keys(from, scores, weight_of, [&](float weight, const unsigned (&words)[4]) {
    const unsigned weights = narrow_pair<BFLOAT>(weight, weight);
    d1 += BFLOAT ? widen<BFLOAT>(weights & 0xffff) : weight;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if constexpr (BFLOAT) {
        pairs[e] = multiply_add_pairs(weights, words[e], pairs[e]);
      } else {
        const float2 x = widen_pair<false>(words[e]);
        sums[2 * e] += weight * x.x, sums[2 * e + 1] += weight * x.y;
      }
      largest_pairs[e] = larger_pairs<BFLOAT>(largest_pairs[e], words[e] & 0x7fff7fffu);
    }
  });
  if constexpr (BFLOAT) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = widen_pair<true>(pairs[e]);
      sums[2 * e] = x.x, sums[2 * e + 1] = x.y;
    }
  }
  // Anew: what is used here alone costs registers elsewhere.
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32, kind = thread / D;
  const Lane at(lane);
  stage(shared.staged[0][warp], at, sums);
  d1 = of_all_keys(d1);
  if (lane == 0) shared.warp_d1[0][warp] = d1;
  if (choose) {
    const float2 larger = widen_pair<BFLOAT>(larger_pairs<BFLOAT>(larger_pairs<BFLOAT>(largest_pairs[0], largest_pairs[1]),
                                                                  larger_pairs<BFLOAT>(largest_pairs[2], largest_pairs[3])));
    const float largest = fmaxf(larger.x, larger.y);
    // An infinity, which no scale saves, hides a lane's other numbers.
    note_largest(shared, at, largest < -minus_infinity() ? largest : 0.0f);
  }
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  d1 = staged_d1(shared, 0);
  // Zeros alone say nothing of the scale, and make what follows NaN.
  float column_scale = scale_of(shared.largest[kind], ROOMY, 0.0f);
  if (choose) {
    scale = scale_of(shared.largest[at.is_value()], ROOMY, 0.0f);
    if (thread == kind * D) shared.inverse_scale[kind] = inverse_of_scale(column_scale);
  } else {
    column_scale = inverse_of_scale(shared.inverse_scale[kind]);
  }
  // As a float16, which is subtracted from others without another rounding.
  const float now = widen<false>(narrow<false>(column_scale * staged_sum(shared, 0, thread) * reciprocal_fast(d1)));
  shared.origin[thread] = now * inverse_of_scale(column_scale);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  read_origin(shared.origin, at.column(), scale, origin);
}

// Moves the origin to the weighted mean of the keys before this tile and in it, by all transform warps, whosever the tile
// is; the sums, relative to the old origin and maximum, follow. Rare: the maximum grew by a factor of 2^LAZY_LOG2.
__device__ __forceinline__ void recentre(Shared& shared, unsigned from, const float* scores, float half_shift,
                                         float rescale, int move, float scale, float (&sums)[8], unsigned (&origin)[4], float& d1) {
  float tile_sums[8] = {}, tile_d1 = 0.0f;
  float2 origins[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    origins[e] = widen_pair<false>(origin[e]);
    origins[e].x *= inverse_of_scale(scale), origins[e].y *= inverse_of_scale(scale);
  }
  const auto weight_of = [&](float score) {
    const float root = root_of(score, half_shift);
    return root * root;
  };
  take_shared_keys(from, scores, weight_of, [&](float weight, const unsigned (&words)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = widen_pair<BFLOAT>(words[e]);
      tile_sums[2 * e] += weight * (x.x - origins[e].x);
      tile_sums[2 * e + 1] += weight * (x.y - origins[e].y);
    }
    tile_d1 += weight;
  });
  // Anew: what is used here alone costs registers elsewhere.
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32, kind = thread / D;
  const Lane at(lane);
  // The sums before this tile, and those of the tile, in units of keys and values.
  stage(shared.staged[0][warp], at, sums);
  stage(shared.staged[1][warp], at, tile_sums);
  const float d1_of_warp = sum_of_lanes(d1);
  tile_d1 = of_all_keys(tile_d1);
  if (lane == 0) shared.warp_d1[0][warp] = d1_of_warp, shared.warp_d1[1][warp] = tile_d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  const float before = staged_sum(shared, 0, thread), sum = staged_sum(shared, 1, thread);
  const float d1_before = staged_d1(shared, 0), d1_now = staged_d1(shared, 1);
  const float column_scale = inverse_of_scale(shared.inverse_scale[kind]);
  const float shift = (rescale * before + column_scale * sum) * reciprocal_fast(rescale * d1_before + d1_now);
  const float old = column_scale * shared.origin[thread];
  // As a float16, which is subtracted from others without another rounding.
  const float now = widen<false>(narrow<false>(old + shift));
  auto& moved = shared.moved[move % 2];
  moved.shift[thread] = now - old;
  moved.sums[thread] = before;
  shared.origin[thread] = now * inverse_of_scale(column_scale);
  if (thread == 0) moved.d1 = d1_before;
#ifdef FOR_RACECHECK
  come(shared.moved_by_all[move % 2]);
#endif
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  read_origin(shared.origin, at.column(), scale, origin);
  // Lanes of a chunk have sums of other keys; the first one's move by all.
  const float moving = at.sub_key == 0 ? d1_of_warp : 0.0f;
#pragma unroll
  for (int e = 0; e < 8; e++) sums[e] = rescale * (sums[e] - moving * moved.shift[at.column() + e]);
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
  d1 = sum_of_lanes(d1);
  if (lane == 0) shared.warp_d1[0][warp] = d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  const float sum = staged_sum(shared, 0, thread) * shared.inverse_scale[thread / D];
  shared.sums[thread] = sum;
  if (!(fabsf(sum) < -minus_infinity())) atomicMax(&shared.out_of_range, 1);
  if (thread == 0) {
    shared.own.d1 = shared.bad_page ? quiet_nan() : staged_d1(shared, 0);
    shared.own.m = m;
  }
}

// A lane's keys of a tile become X, and add to the sums. x: of its first key, whose number in the warp is `key`; roots: of the key that
// has the lane's number there, twice. SCALED: whether the scale is not 1.
template <bool SCALED>
__device__ __forceinline__ void transform(unsigned x, unsigned roots, int key, float scale, const unsigned (&origin)[4], float (&sums)[8]) {
  const unsigned scales = narrow_pair<BFLOAT>(scale, scale);
#pragma unroll 1
  for (int keys = 0; keys < LANE_KEYS; keys += KEYS_AT_ONCE) {
    unsigned of_keys[KEYS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; i++) of_keys[i] = __shfl_sync(~0u, roots, key + key_of(i));
    key += key_of(KEYS_AT_ONCE);
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
      const float root = widen<false>(of_keys[i] & 0xffff);
      const unsigned words[4] = {raws[i].x, raws[i].y, raws[i].z, raws[i].w};
      unsigned rounded[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        unsigned raw = SCALED ? multiply_pairs<BFLOAT>(words[e], scales) : words[e];
        if constexpr (BFLOAT) {
          const float2 wide = widen_pair<true>(raw);
          raw = narrow_pair<false>(wide.x, wide.y);
        }
        rounded[e] = multiply_pairs<false>(subtract_pairs(raw, origin[e]), of_keys[i]);
        const float2 weighted = widen_pair<false>(rounded[e]);
        sums[2 * e] += root * weighted.x, sums[2 * e + 1] += root * weighted.y;
      }
      shared_store4(at_key(x, i), {rounded[0], rounded[1], rounded[2], rounded[3]});
    }
    x = at_key(x, KEYS_AT_ONCE);
  }
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
    scale = scale_of(shared.largest[at.is_value()], TIGHT, 1.0f);
    if (thread < 32 && at.channel() == 0 && at.sub_key == 0) shared.inverse_scale[at.is_value()] = inverse_of_scale(scale);
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  }

  unsigned origin[4] = {};  // of this lane's columns, scaled, in pairs
  float sums[8] = {};
  float m = minus_infinity(), d1 = 0.0f;
  int move = 0;
  // The largest score of a tile grew the maximum: with that and the origin moves what the group has summed up. Returns
  // what brings sums to the new maximum.
  const auto grow = [&](int tile, float largest) {
    const float rescale = exp2_fast(m - largest);
    const bool is_first = m == minus_infinity();
    m = largest;
    const float* scores = &shared.scores[tile % SCORE_STAGES][first_key];
    const unsigned from = ring + tile % SLOTS * SLOT;
    if (is_first) {
      choose_origin(shared, from, scores, m, !exact, scale, origin);
      return 1.0f;
    }
    // The moments follow a shift when its tile reaches them. The last but one, in whose place this comes, was of a tile
    // two before at least.
    if (tile >= 2) mbarrier_wait(shared_address(&shared.x_empty[(tile - 2) % SLOTS]), (tile - 2) / SLOTS & 1);
    recentre(shared, from, scores, 0.5f * m, rescale, move, scale, sums, origin, d1);
    move++;
    return rescale;
  };
  const auto has_grown = [&](float largest) { return largest > m + LAZY_LOG2; };

  // Only the first and the last tile may have keys that no one sees.
  const auto is_partial = [&](int tile) {
    const int first_of_tile = shared.begin + tile * TILE;
    return first_of_tile < shared.first || first_of_tile + TILE > shared.end;
  };
  constexpr int NONE = -2;
  const int first_partial = is_partial(0) ? 0 : NONE, last_partial = is_partial(tiles - 1) ? tiles - 1 : NONE;
  static_assert(GROUPS == 2, "the tile before is the other group's");
  unsigned slot = group;
  // The second group begins at -1: it does not wait for its own first tile when it helps with the first one.
#pragma unroll 1
  for (int tile = -group;; tile += GROUPS) {
    delay();
    // To the end, the tile before is the other group's.
    const bool own = tile >= 0 && tile < tiles;
    if (!own && (tile > tiles || tiles == 0)) break;
    unsigned x = ring + slot * SLOT;
    const int last = own ? tile : max(tile - 1, 0);
    mbarrier_wait(shared_address(&shared.scores_full[last % SCORE_STAGES]), last / SCORE_STAGES & 1);
    const float2* pairs = reinterpret_cast<const float2*>(shared.scores[0]) + lane;
    const float2 pair = pairs[last % SCORE_STAGES * (TILE / 2)];
    const float2 before = pairs[(tile > 0 ? tile - 1 : 0) % SCORE_STAGES * (TILE / 2)];
    float rescale = 1.0f;
    const bool partial = tile == first_partial || tile == last_partial;
    if (__any_sync(~0u, has_grown(fmaxf(fmaxf(pair.x, pair.y), fmaxf(before.x, before.y)))) || partial) {
      // One place where the origin moves: code that is there several times is fetched anew by every block.
#pragma unroll 1
      for (int next = tile > 0 ? tile - 1 : 0; next <= last; next++) {
        const float2 of_next = next == tile ? pair : before;
        const float largest = largest_of_lanes(of_next);
        rescale = has_grown(largest) ? grow(next, largest) : 1.0f;
      }
      if (own && partial) {
        // Rows that no one sees may hold anything, and a weight of 0 times NaN is NaN.
        const int first_of_tile = shared.begin + tile * TILE;
#pragma unroll 1
        for (int i = 0; i < LANE_KEYS; i++) {
          const int key = first_of_tile + first_key + key_of(i);
          if (key < shared.first || key >= shared.end) shared_store4(at_key(x, i), {0, 0, 0, 0});
        }
      }
    }
    if (tile < 0) continue;
    if (!own) break;
    const float half_shift = m == minus_infinity() ? 0.0f : 0.5f * m;
    // Of one key a lane.
    const unsigned roots = roots_of(shared.scores[tile % SCORE_STAGES][warp * WARP_KEYS + lane % WARP_KEYS], half_shift);
    const float root = widen<false>(roots & 0xffff);
    if (lane < WARP_KEYS) d1 += root * root;
    if (__any_sync(~0u, scale != 1.0f))
      transform<true>(x, roots, 4 * at.sub_key, scale, origin, sums);
    else
      transform<false>(x, roots, 4 * at.sub_key, scale, origin, sums);
    if (lane == 0 && warp == 0) shared.rescale[slot] = rescale;
    fence_async_proxy();
    arrive_as_warp(shared.x_full[slot], lane);
    slot = slot + GROUPS < SLOTS ? slot + GROUPS : slot + GROUPS - SLOTS;
  }

  leave_sums(shared, sums, d1, m);
}
