#pragma once
// The second pass: with the slope u each key's weight is p (1 + u (k - kbar)), and the output is the mean of the values by these
// weights, which add up to 1 but for what was rounded. The keys are those that X stands for, made anew as it was.

#include "lla/two_pass/keys.cuh"
#include "lla/vectors.cuh"

// How a lane weighs its keys of a tile, as it has their values.
struct Weights {
  Reference reference;
  float slope[8];  // of the lane's channels, in units of X
  float constant;  // 1 + u (k0 - kbar)

  __device__ __forceinline__ Weights(const Shared& shared, const Lane& at, int lane, const Entries& solved) {
    reference.read(shared, at);
    Entries distance;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
      const int column = column_of_entry(lane, e);
      distance.of[e] = shared.origin[column] - shared.mean[column];
    }
    constant = 1.0f + inner_product(solved, distance);
#pragma unroll
    for (int e = 0; e < 8; e++) slope[e] = shared.inverse_scale * shared.slope[at.column() + e];
  }

  template <bool SCALED>
  __device__ __forceinline__ void find(unsigned x, const float* scores, float (&weights)[LANE_KEYS]) const {
    const float4 of_keys = *reinterpret_cast<const float4*>(scores);
    const float of_four[LANE_KEYS] = {of_keys.x, of_keys.y, of_keys.z, of_keys.w};
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
      const uint4 raw = shared_load4(at_key(x, i));
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w}, roots = reference.roots_of(of_four[i]);
      const float root = widen<false>(roots & 0xffff);
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 rounded = widen_pair<false>(reference.operator()<SCALED>(words[e], e, roots));
        sum += slope[2 * e] * rounded.x, sum += slope[2 * e + 1] * rounded.y;
      }
      // Over the lanes with other channels.
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        if (lanes != 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      weights[i] = root * (root * constant + sum);
    }
  }
};

// A lane's values of a tile, by their weights.
__device__ __forceinline__ void add_values(unsigned values, const float (&weights)[LANE_KEYS], float (&sums)[8]) {
#pragma unroll
  for (int i = 0; i < LANE_KEYS; i++) {
    const uint4 raw = shared_load4(at_key(values, i));
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 v = widen_pair<BFLOAT>(words[e]);
      sums[2 * e] += weights[i] * v.x, sums[2 * e + 1] += weights[i] * v.y;
    }
  }
}

// Writes the row's output; the first tiles are on their way from position `at` on.
__device__ __forceinline__ void take_values(Shared& shared, const lla::Call& call, const Maps& maps, const Source& from, Position at, const Entries& solved, half_bits* out) {
  const int thread = thread_index();
  const bool is_first = is_first_warpgroup(thread), brings = __shfl_sync(~0u, thread / 32, 0) == WARPS - 1;
  const Lane lane(thread);
  const float scale_log2 = call.scale * 1.4426950408889634f;
  if (thread < 32) {
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) shared.slope[column_of_entry(thread, e)] = solved.of[e];
  }
  float products[4] = {};
  const auto next_scores = [&](const Position& next, int tile) {
    multiply_rows(shared, next, products);
    wgmma_wait<0>();
    give_scores(shared, from, tile, thread, products, scale_log2);
  };
  if (is_first) next_scores(at, 0);
  meet();
  const Weights weights_of(shared, lane, thread % 32, solved);
  const bool scaled = __any_sync(~0u, weights_of.reference.scale != 1.0f);
  float sums[8] = {}, all = 0.0f;
#pragma unroll 1
  for (int tile = 0; tile < from.tiles; tile++) {
    Position values = at;
    values.advance();
    Position next = values;
    next.advance();
    const unsigned k = slot_address(shared, at.slot) + lane.place(), v = slot_address(shared, values.slot) + lane.place();
    const int position = from.position(tile);
    const bool partial = __any_sync(~0u, from.is_partial(position));
    if (partial) hide(lane, k, from.first - position, from.end - position);
    float weights[LANE_KEYS];
    const float* scores = &shared.scores[tile % 2][lane.first_key];
    if (scaled)
      weights_of.find<true>(k, scores, weights);
    else
      weights_of.find<false>(k, scores, weights);
    wait_for_load(shared, values);
    if (partial) hide(lane, v, from.first - position, from.end - position);
    add_values(v, weights, sums);
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) all += weights[i];
    if (partial) fence_async_proxy();
    if (is_first && tile + 1 < from.tiles) next_scores(next, tile + 1);
    meet();
    if (brings) {
      bring_again(shared, call, maps, from, 2 * tile + SLOTS, at.slot, thread % 32);
      bring_again(shared, call, maps, from, 2 * tile + 1 + SLOTS, values.slot, thread % 32);
    }
    at = next;
  }
  stage(shared.staged[0], lane, thread, sums);
  all = of_all_keys(all);
  if (thread % 32 == 0) shared.warp_d1[0][thread / 32] = all;
  meet();
  if (thread < D) out[thread] = narrow<BFLOAT>(staged_sum(shared, 0, thread) / staged_d1(shared, 0));
}
