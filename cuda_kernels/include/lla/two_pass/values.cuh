#pragma once
// The second pass: with the slope u each key's weight is p (1 + u (k - kbar)), and the output is the mean of the values by these
// weights, which add up to 1 but for what was rounded. The keys are those that X stands for: the last of it is in the ring yet, the
// rest is made anew as it was.

#include "lla/two_pass/keys.cuh"

constexpr int SLOPE_ROW = 2;  // of the operand: the products with its two parts are one lane's

// The slope as an operand in float16, as X is, and beside it in shared the power of two that it was divided by, in units of X, and
// 1 + u (k0 - kbar). By one warp.
__device__ __forceinline__ void give_slope(Shared& shared, int lane, const Entries& solved) {
  Entries distance;
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) {
    const int column = column_of_entry(lane, e);
    distance.of[e] = shared.origin[column] - shared.mean[column];
    largest = fmaxf(largest, fabsf(solved.of[e]));
  }
  const float constant = 1.0f + inner_product(solved, distance);
  // To between 1 and 2.
  const unsigned exponent = min(max(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23, 1u), 253u);
  if (lane == 0) shared.unit = shared.inverse_scale * __uint_as_float(exponent << 23), shared.constant = constant;
  const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) {
    const int column = column_of_entry(lane, e);
    float rest = inverse * solved.of[e];
#pragma unroll
    for (int row = SLOPE_ROW; row < SLOPE_ROW + 2; row++) {
      const half_bits part = narrow<false>(rest);
      rest -= widen<false>(part);
      unsigned char* to = shared.query[column / 64] + row * 128;
      reinterpret_cast<half_bits*>(to + ((column % 64 / 8 ^ row) << 4))[column % 8] = part;
    }
  }
  fence_async_proxy();
}

// X of a chunk of keys that have come, from position `at` on.
__device__ __forceinline__ void make_chunk(Shared& shared, const lla::Call& call, const Source& from, const Loads& chunk, Position at) {
  const int thread = thread_index();
  const Lane lane(thread);
  Reference reference;
  reference.read(shared, lane);
  const float scale_log2 = call.scale * 1.4426950408889634f;
  float products[4] = {};
  Position next = at;
#pragma unroll 1
  for (int j = 0; j < chunk.count; j++, next.advance()) {
    wait_for_load(shared, next);
    multiply_rows<false>(shared, next.slot, products);
    wgmma_wait<0>();
    give_scores(shared, from, chunk.first + j, thread, products, scale_log2);
  }
  meet();
#pragma unroll 1
  for (int j = 0; j < chunk.count; j++, at.advance()) {
    const unsigned x = slot_address(shared, at.slot) + lane.place();
    const int tile = chunk.first + j, position = from.position(tile);
    if (__any_sync(~0u, from.is_partial(position))) hide(lane, x, from.first - position, from.end - position);
    const float* scores = &shared.scores[tile % SCORE_STAGES][lane.first_key];
    float none[8], no_d1;
    if (__any_sync(~0u, reference.scale != 1.0f))
      transform<true, false>(reference, x, scores, none, no_d1);
    else
      transform<false, false>(reference, x, scores, none, no_d1);
  }
  fence_async_proxy();
  meet();
}

// The weights of a chunk's keys, whose X lies from slot `slot` on, in place of their scores; adds them to `sum`.
__device__ __forceinline__ void weigh_chunk(Shared& shared, const Loads& chunk, unsigned slot, float& sum) {
  const int thread = thread_index();
  const float half_m = shared.m == minus_infinity() ? 0.0f : 0.5f * shared.m, unit = shared.unit, constant = shared.constant;
  float products[SLOTS][4];
#pragma unroll
  for (int j = 0; j < SLOTS; j++) {
    const unsigned at = slot + j < SLOTS ? slot + j : slot + j - SLOTS;
    if (j < chunk.count) multiply_rows<true>(shared, at, products[j]);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < SLOTS; j++) {
    if (j < chunk.count && thread % 4 == SLOPE_ROW / 2) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float& score = shared.scores[(chunk.first + j) % SCORE_STAGES][upper_row(thread) + 8 * h];
        const float root = widen<false>(narrow<false>(root_of(score, half_m)));
        score = root * (root * constant + unit * (products[j][2 * h] + products[j][2 * h + 1]));
        sum += score;
      }
    }
  }
}

// A lane's values of a tile, by the weights of their keys.
__device__ __forceinline__ void add_values(unsigned values, const float* weights, float (&sums)[8]) {
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
    const float4 of_keys = *reinterpret_cast<const float4*>(weights + group * GROUP_KEYS);
    const float of_four[LANE_KEYS] = {of_keys.x, of_keys.y, of_keys.z, of_keys.w};
#pragma unroll
    for (int i = 0; i < LANE_KEYS; i++) {
      const uint4 raw = shared_load4(at_key(at_group(values, group), i));
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 v = widen_pair<BFLOAT>(words[e]);
        sums[2 * e] += of_four[i] * v.x, sums[2 * e + 1] += of_four[i] * v.y;
      }
    }
  }
}

// Writes the row's output. X of the last `kept` tiles lies before position `at`; of what comes after, as much is on its way as the
// ring has room for.
__device__ __forceinline__ void take_values(Shared& shared, const lla::Call& call, const Maps& maps, int kept, Position at, const Entries& solved) {
  const int thread = thread_index();
  const bool brings = ::brings();
  const Lane lane(thread);
  const Source from = shared.source;
  if (thread < 32) give_slope(shared, thread, solved);
  meet();
  float sums[8] = {}, all = 0.0f;
  Loads chunk(from, kept, at), loads = chunk;
#pragma unroll 1
  for (int number = kept; number < SLOTS && loads.any(); number++) loads.advance();
#pragma unroll 1
  for (; chunk.any(); chunk.next_chunk()) {
    unsigned slot = at.slot;
    if (chunk.values) {
      slot = slot >= kept ? slot - kept : slot + SLOTS - kept;
    } else {
      make_chunk(shared, call, from, chunk, at);
#pragma unroll 1
      for (int j = 0; j < chunk.count; j++) at.advance();
    }
    weigh_chunk(shared, chunk, slot, all);
    meet();
    if (brings) loads.bring_next(shared, call, maps, from, chunk.count, thread % 32);
#pragma unroll 1
    for (int j = 0; j < chunk.count; j++, at.advance()) {
      const int tile = chunk.first + j, position = from.position(tile);
      const unsigned v = slot_address(shared, at.slot) + lane.place();
      wait_for_load(shared, at);
      const bool partial = __any_sync(~0u, from.is_partial(position));
      if (partial) hide(lane, v, from.first - position, from.end - position);
      add_values(v, &shared.scores[tile % SCORE_STAGES][lane.first_key], sums);
      if (partial) fence_async_proxy();
      meet();
      if (brings) loads.bring_next(shared, call, maps, from, 1, thread % 32);
    }
  }
  stage(shared, lane, thread, sums);
#pragma unroll
  for (int lanes = 16; lanes >= 4; lanes /= 2) all += __shfl_xor_sync(~0u, all, lanes);
  if (thread % 32 == SLOPE_ROW / 2) shared.warp_d1[thread / 32] = all;
  meet();
  if (thread < D) output_of(call, lla::RowIndex(call, block_index()))[thread] = narrow<BFLOAT>(staged_sum(shared, thread) / staged_d1(shared));
}
