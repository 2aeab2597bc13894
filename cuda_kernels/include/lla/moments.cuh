#pragma once
// The matrix warps: scores of the keys, and in registers the moments X_k^T [X_k X_v].

#include "lla/accumulators.cuh"
#include "lla/copies.cuh"
#include "lla/shape.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"

#if GATHERED
#include "lla/gather_choice.cuh"
#endif

// Accumulators of a warpgroup: all of X_v, then the first KEY_COLUMNS of X_k.
template <int KEY_COLUMNS>
struct Moments {
  static constexpr int VALUES = D / 2, ALL = VALUES + KEY_COLUMNS / 2;
  float (&c)[D];
  // The first warpgroup, whose moments are fewer, sees to the scores too.
  static constexpr bool IS_FIRST = KEY_COLUMNS == 64;

  // The column of X that accumulator e, a multiple of 4, has in this thread.
  __device__ __forceinline__ static int column(int e, int thread) {
    return (e < VALUES ? D + 2 * e : 2 * (e - VALUES)) + thread % 4 * 2;
  }
};

// Moments about the origin before its last shift become moments about the new one.
template <int KEY_COLUMNS>
__device__ __forceinline__ void move_moments(Shared& shared, Moments<KEY_COLUMNS>& moments, int move, float rescale) {
  auto& c = moments.c;
  const int thread = thread_index(), upper = upper_row(thread);
#ifdef FOR_RACECHECK
  // Those that gave the tile have met the others who moved the origin; but racecheck does not follow two barriers in turn.
  mbarrier_wait(shared_address(&shared.moved_by_all[move % 2]), move / 2 & 1);
#endif
  const auto& moved = shared.moved[move % 2];
  const float d1 = moved.d1;
  const float sum[2] = {moved.sums[upper], moved.sums[upper + 8]};
  const float shift[2] = {moved.shift[upper], moved.shift[upper + 8]};
#pragma unroll
  for (int e = 0; e < moments.ALL; e += 4) {
    const int column = moments.column(e, thread);
    const float2 sums = *reinterpret_cast<const float2*>(&moved.sums[column]);
    const float2 shifts = *reinterpret_cast<const float2*>(&moved.shift[column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      c[e + 2 * h] = rescale * (c[e + 2 * h] - sum[h] * shifts.x - shift[h] * (sums.x - d1 * shifts.x));
      c[e + 2 * h + 1] = rescale * (c[e + 2 * h + 1] - sum[h] * shifts.y - shift[h] * (sums.y - d1 * shifts.y));
    }
  }
}

// The products of a tile's keys with the query, which begins in run `query_run`, once they are there; by the first warpgroup.
__device__ __forceinline__ void multiply_query(Shared& shared, unsigned slot, unsigned parity, float (&scores)[4], unsigned query_run) {
  delay();
  mbarrier_wait(shared_address(&shared.raw_full[slot]), parity);
  const unsigned long long keys = channels_innermost(shared_address(shared.ring)) + descriptor_step(slot * SLOT);
  const unsigned long long query = channels_innermost(shared_address(shared.query[query_run]));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < D / 16; step++) {
    const unsigned in_row = step % 4 * 32;
    wgmma_scores<BFLOAT>(scores, keys + descriptor_step(place_of_run(false, step / 4) * RUN + in_row),
                         query + descriptor_step(step / 4 * VECTOR + in_row), step > 0);
  }
  wgmma_commit();
}

// Makes those known to the transform warps, in units of log2; -inf for keys that are not seen.
__device__ __forceinline__ void give_scores(Shared& shared, int thread, unsigned tile, const float (&scores)[4], float scale_log2, const Range& seen) {
  const int lane = thread % 32;
  const unsigned stage = tile % SCORE_STAGES;
  // Column 0 of the products.
  if (lane % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int in_tile = upper_row(thread) + 8 * h, key = int(tile) * TILE + in_tile;
      shared.scores[stage][in_tile] = key < seen.first || key >= seen.end ? minus_infinity() : scale_log2 * scores[2 * h];
    }
  }
  arrive_as_warp(shared.scores_full[stage], lane);
}

// Accumulators FIRST to LAST of the moments, about the means, to shared memory; of a whole row divided by its weight,
// and with the ridge.
template <int FIRST, int LAST, int KEY_COLUMNS>
__device__ __forceinline__ void store_moments(Shared& shared, const Moments<KEY_COLUMNS>& moments, float factor,
                                              bool whole, float ridge) {
  const int thread = thread_index(), upper = upper_row(thread);
  const auto& c = moments.c;
  const float inverse_d1 = inverse_weight(shared.own.d1), whole_factor = whole ? inverse_d1 : 1.0f;
  const float mean[2] = {shared.sums[upper] * inverse_d1, shared.sums[upper + 8] * inverse_d1};
#pragma unroll
  for (int e = FIRST; e < LAST; e += 4) {
    const int column = moments.column(e, thread);
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = upper + 8 * h;
      float2 centred = {whole_factor * (factor * c[e + 2 * h] - mean[h] * sums.x),
                        whole_factor * (factor * c[e + 2 * h + 1] - mean[h] * sums.y)};
      if (whole && row == column) centred.x += ridge;
      if (whole && row == column + 1) centred.y += ridge;
      *reinterpret_cast<float2*>(&shared.moments[row][column]) = centred;
    }
  }
}

// Whether scores are multiplied just before a tile's products, and not while X of the tile is waited for: with heads of 64, where one
// warpgroup does all, 2 % less time; with heads of 128 2 to 9 % more (on an H200).
constexpr bool SCORES_BESIDE = D == 64;

// One pass over the tiles: a warpgroup accumulates the moments of its 64 key channels with the first KEY_COLUMNS, up
// to its own (the rest is symmetric), and with all value channels. Its own instructions bound the pass with heads of 64:
// what does not need a tile's X, the copy in place of the tile before and, unless they are beside its products, scores of a later
// tile, comes ahead of the wait for it, and what the loop counts is the same in all lanes, for the compiler too. early: tiles that were brought, with their scores, by the
// transform warps.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate(Shared& shared, const lla::Call& call, const Maps& maps, Moments<KEY_COLUMNS>& moments, int tiles, unsigned early, unsigned query_run) {
  auto& c = moments.c;
  constexpr bool IS_FIRST = Moments<KEY_COLUMNS>::IS_FIRST;
  const float scale_log2 = call.scale * 1.4426950408889634f;
#pragma unroll
  for (int e = 0; e < moments.ALL; e++) c[e] = 0.0f;
  const unsigned long long x = keys_outermost(shared_address(shared.ring), RUN);
  float scores[4] = {};
  const Source source(shared);
  const int thread = thread_index() % 128;  // kept: it is slow to read
  // From the first tile's first key on.
  const Range seen = {shared.first - source.begin, source.end - source.begin};
  // Of the tile whose scores are next: they run ahead of X, so that no group waits for them.
  unsigned ahead = early, ahead_slot = early, ahead_parity = 0;
  const auto multiply_next = [&] { multiply_query(shared, ahead_slot, ahead_parity, scores, query_run); };
  const auto give_next = [&] {
    give_scores(shared, thread, ahead, scores, scale_log2, seen);
    ahead++;
    if (++ahead_slot == SLOTS) ahead_slot = 0, ahead_parity ^= 1;
  };
  const int warp = __shfl_sync(~0u, thread / 32, 0);
  const auto bring_tile = [&](const Source& from, int tile, int slot) {
    if (warp < COPYING_WARPS && thread % 32 < BOXES) bring(shared, call, maps, from, warp, tile, slot, thread % 32);
    __syncwarp();
  };
  if (IN_TURN && early) {
    if constexpr (KEY_COLUMNS == D) bring_tiles<EARLY_TILES, SLOTS>(shared, call, maps, source, tiles, warp, thread % 32);
  } else if constexpr (IS_FIRST) {
#pragma unroll 1
    while (ahead < min(SCORES_AHEAD, tiles)) {
      multiply_next(), wgmma_wait<0>(), give_next();
      if constexpr (KEY_COLUMNS == D) {
        // One more for each that is there; in the end all that there is room for.
        const int brought = ahead < SCORES_AHEAD ? int(ahead) + ON_THEIR_WAY : SLOTS;
#pragma unroll 1
        for (int next = ahead + ON_THEIR_WAY - 1; next < min(brought, tiles); next++) bring_tile(source, next, next);
      }
    }
  } else {
    // One more for each that is there.
#pragma unroll 1
    for (int next = AT_FIRST; next < min(SLOTS, tiles); next++) {
      mbarrier_wait(shared_address(&shared.raw_full[max(next - ON_THEIR_WAY, 0)]), 0);
      bring_tile(source, next, next);
    }
  }
  unsigned slot = 0, parity = 0, move = 0, before = 0, parity_before = 0;
#pragma unroll 1
  for (unsigned tile = 0; tile < tiles; tile++) {
    const bool more = ahead < tiles && (!IN_TURN || ahead <= tile + SCORES_AHEAD);
    if (IS_FIRST && !SCORES_BESIDE && more) multiply_next();
    // The products of the tile before went on until here.
    wgmma_wait<0>();
    if (tile > 0 && thread < OF_WARPGROUP) mbarrier_arrive(shared_address(&shared.x_empty[before]));
    if (IS_FIRST && !SCORES_BESIDE && more) give_next();
    if (KEY_COLUMNS == D && tile > 0 && warp < COPYING_WARPS && tile - 1 + SLOTS < tiles) {
      // The tile that takes its place.
      mbarrier_wait(shared_address(&shared.x_empty[before]), parity_before);
      // Read anew with pages, where registers are short.
      constexpr bool ANEW = CONJUGATE_GRADIENTS && PAGED;
      bring_tile(ANEW ? Source(shared) : source, tile - 1 + SLOTS, before);
    }
    delay();
    mbarrier_wait(shared_address(&shared.x_full[slot]), parity);
    const float rescale = shared.rescale[slot];
    if (rescale != 1.0f) move_moments(shared, moments, move++, rescale);
    const auto multiply_tile = [&] {
      wgmma_fence();
      const unsigned long long all = x + descriptor_step(slot * SLOT);
      const unsigned long long own = all + descriptor_step(place_of_run(false, KEY_COLUMNS / 64 - 1) * RUN);
#pragma unroll
      for (int step = 0; step < TILE / 16; step++) {
        const unsigned at = descriptor_step(16 * step * 128);
        if constexpr (D == 64) {
          wgmma_m64n128(c, own + at, all + at);
        } else if constexpr (IS_FIRST) {
          wgmma_m64n192(c, own + at, all + at);
        } else {
          // All columns in one instruction do not compile: its accumulators and operands must fit the registers that a
          // thread has before setmaxnreg.
          wgmma_m64n128(c, own + at, all + at);
          wgmma_m64n128(c + moments.VALUES, own + at, all + at + descriptor_step(RUNS * RUN));
        }
      }
      wgmma_commit();
    };
    if (IS_FIRST && SCORES_BESIDE && more) {
      // The products go on while the scores are given.
      multiply_next(), multiply_tile(), wgmma_wait<1>(), give_next();
    } else {
      multiply_tile();
    }
#if GATHERED
    if (warp == CHOOSING_WARP && tile <= CHOOSES) go_on_to_choose(shared, call, tile);
#endif
    before = slot, parity_before = parity;
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  wgmma_wait<0>();
}
