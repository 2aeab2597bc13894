#pragma once
// The second pass: with the slope u each key's weight is p (1 + u (k - kbar)), and the output is the mean of the values by these
// weights, which add up to 1 but for what was rounded. The keys are those that X stands for: the last of it is in the ring yet, the
// rest is made anew as it was. Each warp has keys of its own to the end.

#include "lla/two_pass/keys.cuh"
#include "lla/vectors.cuh"

// What a key's weight is found with.
struct Slope {
  float unit, constant;  // what the operand was divided by, a power of two, in units of X; 1 + u (k0 - kbar)

  // Leaves the slope in shared as an operand in two parts in float16, as X is; by all threads, one for a number, of which every warp
  // has all.
  __device__ __forceinline__ Slope(Shared& shared, int thread, const Entries& solved) {
    const int lane = thread % 32;
    Entries distance;
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
      const int column = column_of_entry(lane, e);
      distance.of[e] = shared.origin[column] - shared.mean[column];
      largest = fmaxf(largest, fabsf(solved.of[e]));
    }
    constant = 1.0f + inner_product(solved, distance);
    // To between 1 and 2.
    const unsigned exponent = min(max(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23, 1u), 253u);
    unit = shared.inverse_scale * __uint_as_float(exponent << 23);
    const float x = __uint_as_float((254 - exponent) << 23) * shared.slope[thread];
    const half_bits high = narrow<false>(x);
    entry_of_column(shared.slope_columns[0], thread) = high;
    entry_of_column(shared.slope_columns[1], thread) = narrow<false>(x - widen<false>(high));
  }
};

// The weights of the warp's keys of a tile, whose X lies in a slot, in place of their scores. Returns what the lane has of their sum.
__device__ __forceinline__ float weigh_tile(Shared& shared, int tile, unsigned slot, int thread, unsigned rows, float half_m, const Slope& slope, const Columns& parts) {
  float2 products[2];
  multiply_keys<false>(slot, rows, parts, products);
  float sum = 0.0f;
  if (thread % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float& score = shared.scores[tile % SCORE_STAGES][thread / 32 * KEYS_OF_WARP + thread % 32 / 4 + 8 * h];
      const float root = widen<false>(narrow<false>(root_of(score, half_m)));
      score = root * (root * slope.constant + slope.unit * (products[h].x + products[h].y));
      sum += score;
    }
  }
  return sum;
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
  const unsigned rows = rows_of_warp(thread);
  const float scale_log2 = call.scale * 1.4426950408889634f;
  Reference reference;
  reference.read(shared, lane);
  if (thread < 32) {
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) shared.slope[column_of_entry(thread, e)] = solved.of[e];
  }
  meet();
  const Slope slope(shared, thread, solved);
  meet();
  const Columns parts(thread % 32, shared.slope_columns[0], shared.slope_columns[1], shared.zeros);
  const Columns query(thread % 32, shared.query_column, shared.query_column, shared.zeros);
  float sums[8] = {}, all = 0.0f;
  Loads chunk(from, kept, at), loads = chunk;
#pragma unroll 1
  for (int number = kept; number < SLOTS && loads.any(); number++) loads.advance();
#pragma unroll 1
  for (; chunk.any(); chunk.next_chunk()) {
    const unsigned first_slot = chunk.values ? (at.slot >= kept ? at.slot - kept : at.slot + SLOTS - kept) : at.slot;
    if (!chunk.values) {
#pragma unroll 1
      for (int j = 0; j < chunk.count; j++, at.advance()) {
        const int tile = chunk.first + j, position = from.position(tile);
        const unsigned keys = slot_address(shared, at.slot), x = keys + lane.place();
        wait_for_load(shared, at);
        give_scores(shared, from, tile, keys, thread, rows, query, scale_log2);
        if (__any_sync(~0u, from.is_partial(position))) hide(lane, x, from.first - position, from.end - position);
        RawKeys raw;
        raw.load(x);
        float none[8], no_d1;
        transform<false>(reference, lane, raw, x, &shared.scores[tile % SCORE_STAGES][thread / 32 * KEYS_OF_WARP], none, no_d1);
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int j = 0; j < chunk.count; j++) {
      const unsigned slot = first_slot + j < SLOTS ? first_slot + j : first_slot + j - SLOTS;
      all += weigh_tile(shared, chunk.first + j, slot_address(shared, slot), thread, rows, reference.half_m, slope, parts);
      __syncwarp();
      fence_async_proxy();
      meet();
      if (brings) loads.bring_next(shared, call, maps, from, 1, thread % 32);
    }
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
  if (thread % 32 == 0) shared.warp_d1[thread / 32] = all;
  meet();
  if (thread < D) output_of(call, lla::RowIndex(call, block_index()))[thread] = narrow<BFLOAT>(staged_sum(shared, thread) / staged_d1(shared));
}
