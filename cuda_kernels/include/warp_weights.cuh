#pragma once
// What the states of a block's warps weigh when they become one. Their statistics say it, which are complete with the last keys, while
// the values of these are still to come: warps tell each other then, and none waits for it at its end.

#include "arrivals.cuh"
#include "block_meeting.cuh"
#include "delay.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "rows.cuh"
#include "weigh.cuh"

// Whether they do, and not when all is summed up: with 16 rows registers may be short while values are still to come.
constexpr bool TOLD_EARLY = TILES < 4 || (SINGLE && !PAGED);

// Leaves the statistics of the warp's rows for the others, and what its sums are relative to, from which the maximum may have moved on.
__device__ __forceinline__ void tell_statistics(char* shared, const Accumulator& a, int lane) {
  const int warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const float m = largest_of_row(a.largest[h][n]);
      const Statistics s = {m, sum_of_row(a.d1[h][n]), PROBE ? sum_of_row(a.d2[h][n]) : 0.f, a.t0[h][n]};
      if (g > 0 || t >= QUERIES) continue;
      const int record = warp * RECORDS + Record::number(h, n, t);
      reinterpret_cast<float4*>(shared + STATISTICS_AT)[record] = s.packed();
      reinterpret_cast<float*>(shared + REFERENCES_AT)[record] = a.m[h][n];
    }
}

// Puts the weight and the shift of every warp's state towards that of the block into shared memory, and the block's
// statistics, when all warps have told theirs. By as many warps as it takes, of which this is number `number`.
__device__ __forceinline__ void weigh_warps(char* shared, int number) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < RECORDS * WARPS; first += THREADS) {
    const int i = first + number * 32 + lane, record = i / WARPS, warp = i % WARPS;
    Statistics x = Statistics::none();
    if (record < RECORDS) x = Statistics::of(reinterpret_cast<const float4*>(shared + STATISTICS_AT)[warp * RECORDS + record]);
    const float reference = record < RECORDS ? reinterpret_cast<const float*>(shared + REFERENCES_AT)[warp * RECORDS + record] : 0.f;
    Statistics total = {x.saw_nothing() ? minus_infinity() : x.m, 0, 0, 0};
    const unsigned peers = ((1u << WARPS) - 1) << (lane / WARPS * WARPS), seen = __ballot_sync(~0u, !x.saw_nothing()) & peers;
    // The first state that saw a key gives the shift, all others move to it.
    total.t0 = __shfl_sync(~0u, x.t0, seen ? __ffs(seen) - 1 : 0);
#pragma unroll
    for (int mask = 1; mask < WARPS; mask *= 2) total.m = fmaxf(total.m, __shfl_xor_sync(~0u, total.m, mask));
    // Sums of a warpgroup are those of all its warps, whether or not this one saw a key; if none did they are 0, and so they stay.
    const bool counts = WARPGROUPS || !x.saw_nothing();
    const float factor = counts ? fminf(weight(reference, total.m), 1e30f) : 0.f, step = counts ? x.t0 - total.t0 : 0.f;
    if (!x.saw_nothing()) total.d1 = factor * x.d1, total.d2 = factor * (x.d2 + step * x.d1);
#pragma unroll
    for (int mask = 1; mask < WARPS; mask *= 2)
      total.d1 += __shfl_xor_sync(~0u, total.d1, mask), total.d2 += __shfl_xor_sync(~0u, total.d2, mask);
    if (record >= RECORDS) continue;
    reinterpret_cast<float2*>(shared + FACTORS_AT)[i] = make_float2(factor, step);
    if (warp == 0) reinterpret_cast<float4*>(shared + TOTALS_AT)[record] = total.packed();
  }
}

// When a block's warps have told their statistics. All of them do, of every item.
class WarpsTold {
  unsigned barrier, parity = 0;
  unsigned missing;  // warps that had not come when this one came, in its first lane

 public:
  // By all threads, before the block meets. in_shared: a word of shared memory.
  __device__ WarpsTold(const unsigned long long& in_shared) : barrier(shared_address(&in_shared)) {
    if (threadIdx.x == 0) mbarrier_init(barrier, WARPS * OF_WARP);
  }

  // By a warp that has weighed its last keys of an item.
  __device__ void tell(char* shared, const Accumulator& a, int lane) {
    if constexpr (!TOLD_EARLY) return;
    tell_statistics(shared, a, lane);
    __syncwarp();
    delay();
    if (lane < OF_WARP) missing = mbarrier_arrive_counted(barrier);
#ifdef FOR_RACECHECK
    missing = WARPS - threadIdx.x / 32;
#endif
  }

  // By all warps, when they have no more keys; those that told first weigh all. The block meets after it.
  __device__ void weigh(char* shared, const Accumulator& a, BlockMeeting& meet_block, int lane) {
    if constexpr (!TOLD_EARLY) {
      tell_statistics(shared, a, lane);
      meet_block();
      return weigh_warps(shared, threadIdx.x / 32);
    }
    const int number = WARPS - __shfl_sync(~0u, missing, 0);
    if (number * 32 < RECORDS * WARPS) {
      mbarrier_wait(barrier, parity);
      weigh_warps(shared, number);
    }
    parity ^= 1;
  }
};
