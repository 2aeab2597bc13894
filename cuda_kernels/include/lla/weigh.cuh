#pragma once
// The transform warps: X = sqrt(p) (k - k0 | v - v0) of every tile, in float16, in place of the tile, and the sums of
// weighted keys and values. Those are taken of the same rounded roots and X, so that rounding cancels in the covariances.
// Pairs of float16 are subtracted and multiplied at once: k and k0 are exact in it, their difference and X are rounded.
// Each warp has a run of channels (runs.cuh); but where the origin moves, warps of both groups have keys of all channels (lanes.cuh).
//
// The origin is the weighted mean of what was seen when the maximum last grew. It must be near the final mean: the
// tensor cores truncate when they accumulate, and far from the mean that bias is larger than the covariances.
//
// float16 keeps 11 bits where bfloat16 keeps 8, in a range that keys and values may leave: a power of two scales them, of
// the first tile's largest number where that is far from 1. Where a later one is too large beside it, the sums come out
// infinite, and the block takes its keys again with the largest of all.

#include "lla/copies.cuh"
#include "lla/lanes.cuh"
#include "lla/runs.cuh"
#include "lla/scale.cuh"
#include "lla/shape.cuh"
#include "ptx/mbarrier.cuh"

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

// What COUNT warps, or groups, have of d1, and of a thread's column, as they staged it.
template <int COUNT>
__device__ __forceinline__ float staged_d1(const Shared& shared, int which) {
  float d1 = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) d1 += shared.warp_d1[which][i];
  return d1;
}

template <int COUNT>
__device__ __forceinline__ float staged_sum(const Shared& shared, int first, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) sum += shared.staged[first + i][column];
  return sum;
}

// What a group has, by its warps.
__device__ __forceinline__ void stage_group(Shared& shared, int group, const RunSums& sums, float d1_of_group, int thread) {
  sums.store(shared.staged[group], thread);
  if (thread / 32 % GROUP_WARPS == 0 && thread % 32 == 0) shared.warp_d1[0][group] = d1_of_group;
}

// The first origin of a pass and, unless it is there, the scale, when a maximum was first found in a tile: the weighted mean of
// that tile, by all transform warps, whosever it is. from, scores: of the tile, of this warp's keys. An origin need only be near
// the mean: a lane's few numbers are added up in pairs, in half precision; those of float16 in float, as sums may leave its range.
__device__ __forceinline__ void choose_origin(Shared& shared, unsigned from, const float* scores, float m, bool choose,
                                              float& scale, RunOrigin& origin) {
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
  stage(shared.staged[warp], at, sums);
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
  d1 = staged_d1<TRANSFORM_WARPS>(shared, 0);
  // Zeros alone say nothing of the scale, and make what follows NaN.
  float column_scale = scale_of(shared.largest[kind], ROOMY, 0.0f);
  if (choose) {
    scale = scale_of(shared.largest[is_value_run(thread)], ROOMY, 0.0f);
    if (thread == kind * D) shared.inverse_scale[kind] = inverse_of_scale(column_scale);
  } else {
    column_scale = inverse_of_scale(shared.inverse_scale[kind]);
  }
  // As a float16, which is subtracted from others without another rounding.
  const float now = widen<false>(narrow<false>(column_scale * staged_sum<TRANSFORM_WARPS>(shared, 0, thread) * reciprocal_fast(d1)));
  shared.origin[thread] = now * inverse_of_scale(column_scale);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  origin.read(shared.origin, scale, thread);
}

// Moves the origin to the weighted mean of the keys before this tile and in it, by all transform warps, whosever the tile
// is; the sums, relative to the old origin and maximum, follow. Rare: the maximum grew by a factor of 2^LAZY_LOG2.
__device__ __forceinline__ void recentre(Shared& shared, unsigned from, const float* scores, float half_shift,
                                         float rescale, int move, float scale, RunSums& sums, RunOrigin& origin, float& d1) {
  float tile_sums[8] = {}, tile_d1 = 0.0f;
  float origins[8];
#pragma unroll
  for (int e = 0; e < 8; e++) origins[e] = shared.origin[Lane(thread_index() % 32).column() + e];
  const auto weight_of = [&](float score) {
    const float root = root_of(score, half_shift);
    return root * root;
  };
  take_shared_keys(from, scores, weight_of, [&](float weight, const unsigned (&words)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = widen_pair<BFLOAT>(words[e]);
      tile_sums[2 * e] += weight * (x.x - origins[2 * e]);
      tile_sums[2 * e + 1] += weight * (x.y - origins[2 * e + 1]);
    }
    tile_d1 += weight;
  });
  // Anew: what is used here alone costs registers elsewhere.
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32, kind = thread / D;
  const Lane at(lane);
  // The sums before this tile, and those of the tile, in units of keys and values.
  const float d1_of_group = sum_of_lanes(d1);
  stage_group(shared, warp / GROUP_WARPS, sums, d1_of_group, thread);
  stage(shared.staged[GROUPS + warp], at, tile_sums);
  tile_d1 = of_all_keys(tile_d1);
  if (lane == 0) shared.warp_d1[1][warp] = tile_d1;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  const float before = staged_sum<GROUPS>(shared, 0, thread), sum = staged_sum<TRANSFORM_WARPS>(shared, GROUPS, thread);
  const float d1_before = staged_d1<GROUPS>(shared, 0), d1_now = staged_d1<TRANSFORM_WARPS>(shared, 1);
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
  origin.read(shared.origin, scale, thread);
  sums.move(moved.shift, d1_of_group, rescale, thread);
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

// The sums of both groups, at the end.
__device__ __forceinline__ void leave_sums(Shared& shared, const RunSums& sums, float d1, float m) {
  const int thread = thread_index() - MATRIX_THREADS;
  stage_group(shared, thread / 32 / GROUP_WARPS, sums, sum_of_lanes(d1), thread);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  const float sum = staged_sum<GROUPS>(shared, 0, thread) * shared.inverse_scale[thread / D];
  shared.sums[thread] = sum;
  if (!(fabsf(sum) < -minus_infinity())) atomicMax(&shared.out_of_range, 1);
  if (thread == 0) {
    shared.own.d1 = shared.bad_page ? quiet_nan() : staged_d1<GROUPS>(shared, 0);
    shared.own.m = m;
  }
}

// When a tile has come while the row before is solved: asks for another, and gives its scores, for which the matrix warps have no time: in
// units of log2, -inf for keys that are not seen. Each warp of a group has 16 keys.
__device__ __forceinline__ void receive_early(Shared& shared, const lla::Call& call, const Maps& maps, int tile, int early, unsigned slot, unsigned query_run) {
  // Anew: what is used here alone costs registers elsewhere.
  const int thread = thread_index(), warp = thread / 32 % GROUP_WARPS, lane = thread % 32;
  mbarrier_wait(shared_address(&shared.raw_full[slot]), 0);
  const Source from(shared);
  if (const int next = tile + EARLY_AT_FIRST; next < early && lane < BOXES) bring(shared, call, maps, from, warp, next, next, lane);
  __syncwarp();
  // Where the lane has a row of the operands: of the tile's keys, and of the query, which is the first of eight.
  const int key = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
  const unsigned keys = shared_address(shared.ring) + slot * SLOT + place_of_run(false, 0) * RUN + key * 128 + ((lane / 16 ^ key % 8) << 4);
  const unsigned query = shared_address(shared.query[query_run]) + lane % 8 * 128 + ((lane / 8 ^ lane % 8) << 4);
  // Sums that do not wait for one another hide each other's latency.
  float sums[2][4] = {};
#pragma unroll
  for (int half = 0; half < D / 32; half++) {
    unsigned b[4], a[2][4];
    load_matrices(b, (query + half / 2 * VECTOR) ^ half % 2 << 6);
#pragma unroll
    for (int step = 0; step < 2; step++) load_matrices(a[step], (keys + half / 2 * RUN) ^ (half % 2 * 2 + step) << 5);
#pragma unroll
    for (int step = 0; step < 2; step++)
      multiply_add<BFLOAT>(sums[step][0], sums[step][1], sums[step][2], sums[step][3], a[step], b[2 * step], b[2 * step + 1]);
  }
  const float scale_log2 = call.scale * 1.4426950408889634f;
  if (lane % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int in_tile = warp * 16 + lane / 4 + 8 * h, position = shared.begin + tile * TILE + in_tile;
      shared.scores[tile % SCORE_STAGES][in_tile] = position < shared.first || position >= shared.end ? minus_infinity() : scale_log2 * (sums[0][2 * h] + sums[1][2 * h]);
    }
  }
  arrive_as_warp(shared.scores_full[tile % SCORE_STAGES], lane);
}

// One pass over the tiles. Leaves the sums about the origin in shared.sums, their weight and the maximum in shared.own. early: tiles at
// the beginning whose scores are not given by the matrix warps. turn: of the row.
__device__ __forceinline__ void weigh(Shared& shared, const lla::Call& call, const Maps& maps, int tiles, int early, unsigned turn) {
  const int thread = thread_index() - MATRIX_THREADS, lane_of_thread = thread % 32;
  const int group = thread / 32 / GROUP_WARPS, warp = thread / 32 % GROUP_WARPS;
  const unsigned ring = shared_address(shared.ring);

  float scale = 1.0f;
  if (shared.exact) {
    const Lane at(lane_of_thread);
    note_largest(shared, at, largest_of_all(shared, call, at, thread / 32));
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
    scale = scale_of(shared.largest[is_value_run(thread)], TIGHT, 1.0f);
    if (thread < 2) shared.inverse_scale[thread] = inverse_of_scale(scale_of(shared.largest[thread], TIGHT, 1.0f));
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  }

  RunOrigin origin;
  RunSums sums;
  float m = minus_infinity(), d1 = 0.0f;
  int move = 0;
  // The largest score of a tile grew the maximum: with that and the origin moves what the group has summed up. Returns
  // what brings sums to the new maximum.
  const auto grow = [&](int tile, float largest) {
    const float rescale = exp2_fast(m - largest);
    const bool is_first = m == minus_infinity();
    m = largest;
    const Lane at(thread_index() % 32);
    const float* scores = &shared.scores[tile % SCORE_STAGES][warp * WARP_KEYS + 4 * at.sub_key];
    const unsigned from = ring + tile % SLOTS * SLOT + at.place(warp);
    if (is_first) {
      choose_origin(shared, from, scores, m, !shared.exact, scale, origin);
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
    // Anew where registers are short.
    const int lane = IN_TURN && !BFLOAT ? thread_index() % 32 : lane_of_thread;
    if (!own && (tile > tiles || tiles == 0)) break;
    if (IN_TURN && tile >= 0 && tile < early) receive_early(shared, call, maps, tile, early, slot, turn % QUERIES * RUNS);
    const unsigned run = ring + slot * SLOT + warp * RUN;
    const int last = own ? tile : max(tile - 1, 0);
    mbarrier_wait(shared_address(&shared.scores_full[last % SCORE_STAGES]), last / SCORE_STAGES & 1);
    // Those of the tile before are there then too, unless the other group gives them.
    if (IN_TURN && tile > 0 && tile <= early) mbarrier_wait(shared_address(&shared.scores_full[tile - 1]), 0);
    // Before what is found of the scores, which takes as long.
    RawBlocks raw(run, lane);
    if (own) raw.load_first();
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
        const int first_of_tile = shared.begin + tile * TILE;
        hide_keys(run, shared.first - first_of_tile, shared.end - first_of_tile, lane);
      }
      // Again: kept over this it would cost registers, and hidden keys have been cleared since.
      if (own) raw.load_first();
    }
    if (tile < 0) continue;
    if (!own) break;
    const float half_shift = m == minus_infinity() ? 0.0f : 0.5f * m;
    // Of two keys a lane, which all warps of the group have.
    const unsigned roots = narrow_pair<false>(root_of(pair.x, half_shift), root_of(pair.y, half_shift));
    const float2 rounded = widen_pair<false>(roots);
    d1 += rounded.x * rounded.x + rounded.y * rounded.y;
    if (__any_sync(~0u, scale != 1.0f))
      raw.scale_and_transform(roots, scale, origin, sums, lane);
    else
      raw.transform(roots, origin, sums, lane);
    if (lane == 0 && warp == 0) shared.rescale[slot] = rescale;
    fence_async_proxy();
    arrive_as_warp(shared.x_full[slot], lane);
    slot = slot + GROUPS < SLOTS ? slot + GROUPS : slot + GROUPS - SLOTS;
  }

#if ROWS_IN_TURN
  // The sums of the row before are read until it is solved.
  if (turn > 0) mbarrier_wait(shared_address(&shared.ended), turn - 1 & 1);
#endif
  leave_sums(shared, sums, d1, m);
}
