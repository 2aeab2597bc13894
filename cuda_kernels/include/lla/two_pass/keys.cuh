#pragma once
// The first pass: the moments of a row's keys, in registers.
//
// Of every tile each warp makes X = sqrt(p) (k - k0) in float16, of 16 keys, and then 32 rows of X^T X, while the next tile
// becomes X. The sums of weighted keys are taken of the same rounded roots and X, so that rounding cancels in the
// covariances. The second pass makes the same X again: a slope is large where no key determines it, and a key that is rounded
// otherwise there would be far off. So all X of a row are relative to one maximum and one origin, those of the first tile; where
// the weights grow out of that, the row begins anew with the tile that they grew in. What X is scaled by, and why the origin is
// near the mean, is in weigh.cuh.

#include "lla/two_pass/lanes.cuh"
#include "lla/two_pass/scores.cuh"
#include "lla/steps.cuh"
#include "ptx/wgmma.cuh"

// What X is made with.
struct Reference {
  float half_m = 0.0f;  // half of the maximum
  float scale = 1.0f;
  unsigned origin[4] = {};  // of a lane's channels, scaled, in pairs

  __device__ __forceinline__ void read(const Shared& shared, const Lane& at) {
    half_m = shared.m == minus_infinity() ? 0.0f : 0.5f * shared.m;
    scale = inverse_of_scale(shared.inverse_scale);
    read_origin(shared.origin, at.column(), scale, origin);
  }

  // X of two channels. SCALED: whether the scale is not 1.
  template <bool SCALED>
  __device__ __forceinline__ unsigned operator()(unsigned raw, int pair, unsigned roots) const {
    return x_of_pair<SCALED>(raw, narrow_pair<BFLOAT>(scale, scale), origin[pair], roots);
  }
};

// Makes the largest number of all lanes known.
__device__ __forceinline__ void note_largest(Shared& shared, int thread, float largest) {
  const unsigned of_warp = __reduce_max_sync(~0u, __float_as_uint(largest));
  if (thread % 32 == 0) atomicMax(&shared.largest, of_warp);
}

// A number's nearest float16, which is subtracted from others without another rounding.
__device__ __forceinline__ float as_float16(float x) { return widen<false>(narrow<false>(x)); }

// The maximum and the origin, the weighted mean, of the first tile, and the scale unless it is known.
__device__ __forceinline__ void choose_origin(Shared& shared, const Lane& at, int thread, unsigned x, const float* scores, float m, bool exact) {
  float sums[8] = {}, d1 = 0.0f;
  unsigned largest_pair = 0;
#pragma unroll 2
  for (int i = 0; i < GROUPS * LANE_KEYS; i++) {
    const int group = i / LANE_KEYS;
    const float weight = exp2_fast(scores[group * GROUP_KEYS + i % LANE_KEYS] - m);
    uint4 raw = shared_load4(at_key(at_group(x, group), i % LANE_KEYS));
    // What no one sees may be anything.
    if (!(weight > 0.0f)) raw = {0, 0, 0, 0};
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 k = widen_pair<BFLOAT>(words[e]);
      sums[2 * e] += weight * k.x, sums[2 * e + 1] += weight * k.y;
      largest_pair = larger_pairs<BFLOAT>(largest_pair, words[e] & 0x7fff7fffu);
    }
    d1 += weight;
  }
  const float2 larger = widen_pair<BFLOAT>(largest_pair);
  const float largest = fmaxf(larger.x, larger.y);
  if (thread == 0) shared.m = m;
  stage(shared, at, thread, sums);
  d1 = of_all_keys(d1);
  if (thread % 32 == 0) shared.warp_d1[thread / 32] = d1;
  // An infinity, which no scale saves, hides a lane's other numbers.
  if (!exact) note_largest(shared, thread, largest < -minus_infinity() ? largest : 0.0f);
  meet();
  // Zeros alone say nothing of the scale, and make what follows NaN.
  const float scale = exact ? inverse_of_scale(shared.inverse_scale) : scale_of(shared.largest, ROOMY, 0.0f), inverse_scale = inverse_of_scale(scale);
  if (thread < D) {
    const float mean = as_float16(scale * staged_sum(shared, thread) * reciprocal_fast(staged_d1(shared))) * inverse_scale;
    // Without a finite score all is NaN, or a later tile's are the first.
    shared.origin[thread] = m == minus_infinity() ? 0.0f : mean;
  }
  if (thread == 0 && !exact) shared.inverse_scale = inverse_scale;
  meet();
}

// A lane's keys of a tile, as they came.
struct RawKeys {
  uint4 of[GROUPS][LANE_KEYS];

  __device__ __forceinline__ void load(unsigned x) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int i = 0; i < LANE_KEYS; i++) of[group][i] = shared_load4(at_key(at_group(x, group), i));
  }
};

// They become X, and add to the sums of X and of the weights, if SUMS. scores: of the warp's keys.
template <bool SCALED, bool SUMS>
__device__ __forceinline__ void transform(const Reference& reference, const Lane& at, const RawKeys& raw, unsigned x, const float* scores, float (&sums)[8], float& d1) {
  const int lane = thread_index() % 32;
  // Of one key a lane.
  const unsigned roots_of_key = roots_of(scores[lane % KEYS_OF_WARP], reference.half_m);
#pragma unroll
  for (int group = 0; group < GROUPS; group++)
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
      const unsigned roots = __shfl_sync(~0u, roots_of_key, at.first_key % KEYS_OF_WARP + group * GROUP_KEYS + i);
      const float root = widen<false>(roots & 0xffff);
      const uint4& key = raw.of[group][i];
      const unsigned words[4] = {key.x, key.y, key.z, key.w};
      unsigned rounded[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        rounded[e] = reference.operator()<SCALED>(words[e], e, roots);
        if constexpr (SUMS) {
          const float2 weighted = widen_pair<false>(rounded[e]);
          sums[2 * e] += root * weighted.x, sums[2 * e + 1] += root * weighted.y;
        }
      }
      shared_store4(at_key(at_group(x, group), i), {rounded[0], rounded[1], rounded[2], rounded[3]});
    }
  const float root = widen<false>(roots_of_key & 0xffff);
  if (SUMS && lane < KEYS_OF_WARP) d1 += root * root;
}

template <bool SUMS>
__device__ __forceinline__ void transform(const Reference& reference, const Lane& at, const RawKeys& raw, unsigned x, const float* scores, float (&sums)[8], float& d1) {
  if (__any_sync(~0u, reference.scale != 1.0f))
    transform<true, SUMS>(reference, at, raw, x, scores, sums, d1);
  else
    transform<false, SUMS>(reference, at, raw, x, scores, sums, d1);
}

// The largest number of the row's keys.
__device__ __forceinline__ float largest_of_all(const lla::Call& call, const Source& from, int thread) {
  const half_bits* first = static_cast<const half_bits*>(call.k) + thread % (D / 8) * 8;
  float largest = 0.0f;
#pragma unroll 1
  for (int key = from.first + thread / (D / 8); key < from.end; key += THREADS / (D / 8)) {
    const lla::Place place(call, from.batch, key);
    if (place.valid)
      largest = fmaxf(largest, largest_of(__ldg(reinterpret_cast<const uint4*>(first + place.offset(call.k_stride, from.kv_head)))));
  }
  return largest;
}

// Before the keys are taken again with the scale of the largest of all.
__device__ __forceinline__ void rescale(Shared& shared, const lla::Call& call) {
  const int thread = thread_index();
  if (thread == 0) shared.largest = 0;
  meet();
  note_largest(shared, thread, largest_of_all(call, shared.source, thread));
  meet();
  if (thread == 0) shared.inverse_scale = inverse_of_scale(scale_of(shared.largest, TIGHT, 1.0f));
}

// Of the largest growth of a weight beyond what is allowed for, the bits that are the tile it is in; rows of more tiles are not for
// this kernel.
constexpr unsigned TILE_OF_GROWTH = 0xfff;

// One pass over the keys, of which the first AT_FIRST tiles are on their way from position `at` on. Leaves their moments about the
// origin in c, their sums in shared, and X of the last tiles in the ring. Returns the number of the tile in which the weights grew most out of
// what the first one began with, or 0 where none did. exact: whether the scale is that of the largest number of all.
__device__ __forceinline__ int take_keys(Shared& shared, const lla::Call& call, const Maps& maps, bool exact, Position& at, float (&c)[ROW_BLOCKS][D / 2]) {
  const int thread = thread_index();
  const bool brings = ::brings();
  const Lane lane(thread);
  const Source from = shared.source;
  const float scale_log2 = call.scale * 1.4426950408889634f;
  const unsigned rows = rows_of_warp(thread);
  const Columns query(thread % 32, shared.query_column, shared.query_column, shared.zeros);
#pragma unroll
  for (int e = 0; e < ROW_BLOCKS * D / 2; e++) c[e / (D / 2)][e % (D / 2)] = 0.0f;
  float d1 = 0.0f, sums[8] = {};
  if (thread == 0) shared.growth = 0;
  wait_for_load(shared, at);
  if (brings) bring_tiles<AT_FIRST, AT_FIRST + ON_THEIR_WAY>(shared, call, maps, from, at, thread % 32);
  give_scores(shared, from, 0, slot_address(shared, at.slot), thread, rows, query, scale_log2);
  meet();
  const float m = largest_of_lanes(reinterpret_cast<const float2*>(shared.scores[0])[thread % 32]);
  choose_origin(shared, lane, thread, slot_address(shared, at.slot) + lane.place(), &shared.scores[0][lane.first_key], m, exact);
  Reference reference;
  reference.read(shared, lane);
  // Ahead of the tile's turn: loads of the warp's own keys.
  RawKeys raw;
  const auto load_seen = [&](int tile, const Position& at) {
    const unsigned x = slot_address(shared, at.slot) + lane.place();
    const int position = from.position(tile);
    if (__any_sync(~0u, from.is_partial(position))) hide(lane, x, from.first - position, from.end - position);
    raw.load(x);
  };
  load_seen(0, at);
  unsigned slot_before = 0;
#pragma unroll 1
  for (int tile = 0; tile < from.tiles; tile++) {
    transform<true>(reference, lane, raw, slot_address(shared, at.slot) + lane.place(), &shared.scores[tile % SCORE_STAGES][thread / 32 * KEYS_OF_WARP], sums, d1);
    fence_async_proxy();
    Position next = at;
    next.advance();
    if (tile + 1 < from.tiles) {
      // Beside the products of the tile before.
      wait_for_load(shared, next);
      if (const int later = tile + 1 + ON_THEIR_WAY; brings && later < min(SLOTS, from.tiles))
        bring(shared, call, maps, from, later, false, (at.slot + 1 + ON_THEIR_WAY) % SLOTS, thread % 32);
      const float largest = give_scores(shared, from, tile + 1, slot_address(shared, next.slot), thread, rows, query, scale_log2);
      if (__any_sync(~0u, largest > m + LAZY_LOG2)) {
        const float growth = largest > m + LAZY_LOG2 ? fminf(largest - m, 1e30f) : 0.0f;
        atomicMax(&shared.growth, growth > 0.0f ? __float_as_uint(growth) & ~TILE_OF_GROWTH | tile + 1 : 0u);
      }
      load_seen(tile + 1, next);
    }
    wgmma_wait<0>();
    meet();
    if (brings && tile > 0 && tile - 1 + SLOTS < from.tiles) bring(shared, call, maps, from, tile - 1 + SLOTS, false, slot_before, thread % 32);
    const unsigned long long all = keys_outermost(slot_address(shared, at.slot), RUN);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE / 16; step++)
#pragma unroll
      for (int b = 0; b < ROW_BLOCKS; b++)
        wgmma_m64n128(c[b], all + descriptor_step(b * RUN + 16 * step * 128), all + descriptor_step(16 * step * 128));
    wgmma_commit();
    slot_before = at.slot;
    at = next;
  }
  wgmma_wait<0>();

  stage(shared, lane, thread, sums);
  d1 = sum_of_lanes(d1);
  if (thread % 32 == 0) shared.warp_d1[thread / 32] = d1;
  meet();
  const float all = shared.bad_page ? quiet_nan() : staged_d1(shared);
  if (thread < D) {
    const float sum = staged_sum(shared, thread) * shared.inverse_scale;
    shared.sums[thread] = sum;
    const float mean = shared.origin[thread] + sum * inverse_weight(all);
    shared.mean[thread] = mean;
    entry_of_row(shared.solving.right, thread) = query_at(shared, thread) - mean;
    if (!(fabsf(sum) < -minus_infinity())) atomicMax(&shared.out_of_range, 1);
  }
  if (thread == 0) shared.d1 = all;
  meet();
  return shared.growth & TILE_OF_GROWTH;
}
