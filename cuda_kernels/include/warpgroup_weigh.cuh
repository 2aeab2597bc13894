#pragma once
// Weights of a step whose sums a warpgroup has together: relative to one maximum and one shift of each row, which its warps have
// agreed on.
//
// A warp takes those that were agreed on last, and says whether they still do when all meet before they multiply. Seldom they do
// not, and all agree anew.

#include "rows.cuh"
#include "warpgroup_tile.cuh"
#include "weigh.cuh"

// What a lane's two keys of a step weigh, and its sums with them.
struct Weighed {
  float w[HEADS][TILES][4];  // P1, P2 of both
  float d1[HEADS][TILES], d2[HEADS][TILES], spread[HEADS][TILES];
};

__device__ __forceinline__ void take(Accumulator& a, const Weighed& x) {
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) a.d1[h][n] = x.d1[h][n], a.d2[h][n] = x.d2[h][n], a.spread[h][n] = x.spread[h][n];
}

__device__ __forceinline__ void to_log2(float (&c)[HEADS][TILES][4], float scale_log2) {
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) c[h][n][0] *= scale_log2, c[h][n][2] *= scale_log2;
}

// Keys `first` and `first + 8` get no weight unless they are visible; what is hidden may be NaN.
__device__ __forceinline__ void hide(const Accumulator& a, float (&c)[HEADS][TILES][4], int first, const Range& visible) {
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const int key = first + e * 4;
    if (key >= visible.first && key < visible.end) continue;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) c[h][n][e] = minus_infinity(), c[h][n][e + 1] = a.t0[h][n];
  }
}

// Weights of a row's two keys and its sums with them. c: S1 in units of log 2 and S2 of both.
__device__ __forceinline__ void weigh_row(const Accumulator& a, const float (&c)[4], int h, int n, Weighed& x) {
  // Scores that are all -inf so far weigh nothing; against their own maximum they would be NaN.
  const float m = a.m[h][n] == minus_infinity() ? 0.f : a.m[h][n];
  float(&w)[4] = x.w[h][n];
  w[0] = exp2_fast(c[0] - m), w[2] = exp2_fast(c[2] - m);
  w[1] = w[3] = 0;
  x.d1[h][n] = a.d1[h][n] + (w[0] + w[2]);
  x.d2[h][n] = x.spread[h][n] = 0;
  if constexpr (!PROBE) return;
  w[1] = w[0] * (c[1] - a.t0[h][n]), w[3] = w[2] * (c[3] - a.t0[h][n]);
  x.d2[h][n] = a.d2[h][n] + (w[1] + w[3]);
  x.spread[h][n] = a.spread[h][n] + (fabsf(w[1]) + fabsf(w[3]));
  if constexpr (!BFLOAT) {
    const float inverse = 1 / a.scale[h][n];
    w[1] *= inverse, w[3] *= inverse;
  }
}

// Weights relative to what was agreed on. Returns whether the warp calls for more.
__device__ __forceinline__ bool weigh_as_agreed(Accumulator& a, const float (&c)[HEADS][TILES][4], Weighed& x) {
  bool astray = false, drifted = false;
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const float own = fmaxf(c[h][n][0], c[h][n][2]);
      a.largest[h][n] = fmaxf(a.largest[h][n], own);
      astray = is_far(own, a.largest[h][n], a.m[h][n]) || astray;
      weigh_row(a, c[h][n], h, n, x);
      drifted = drifted || has_drifted(x.d1[h][n], x.d2[h][n], x.spread[h][n]);
      if constexpr (!BFLOAT) astray = astray || fmaxf(fabsf(x.w[h][n][1]), fabsf(x.w[h][n][3])) > LARGEST_P2;
    }
  if constexpr (!PROBE) return astray;
  // A lane whose keys' mean lies too far from t0 calls for a look at the warp's; where the warpgroup's does, so does some warp's.
  if (__any_sync(~0u, drifted)) {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        astray = moves(sum_of_row(x.d1[h][n]), sum_of_row(x.d2[h][n]), sum_of_row(x.spread[h][n])) || astray;
  }
  return astray;
}

// What the warps of a warpgroup tell each other of every row, four numbers each, where their statistics go in the end.
struct Told {
  float* numbers;
  int lane;
  __device__ Told(char* shared, int lane) : numbers(reinterpret_cast<float*>(shared + STATISTICS_AT)), lane(lane) {}
  __device__ float& of(int warp, int h, int n, int which) const {
    return numbers[((threadIdx.x / 128 * 4 + warp) * RECORDS + Record::number(h, n, lane % 4)) * 4 + which];
  }
  // By all lanes, of which the first of a row speaks.
  __device__ void tell(int h, int n, int which, float x) const {
    if (lane < 4) of(WarpgroupTile::warp(), h, n, which) = x;
  }
  __device__ float largest(int h, int n, int which) const {
    return fmaxf(fmaxf(of(0, h, n, which), of(1, h, n, which)), fmaxf(of(2, h, n, which), of(3, h, n, which)));
  }
  __device__ float sum(int h, int n, int which) const {
    return (of(0, h, n, which) + of(1, h, n, which)) + (of(2, h, n, which) + of(3, h, n, which));
  }
};

// The warps of a warpgroup agree on maxima and shifts, and weigh the step by them.
__device__ __forceinline__ void agree_anew(Accumulator& a, const float (&c)[HEADS][TILES][4], Weighed& x, const WarpgroupTile& tile,
                                           char* shared, int lane) {
  const Told told(shared, lane);
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) told.tell(h, n, 0, largest_of_row(a.largest[h][n]));
  barrier_sync(tile.barrier(), 128);
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      a.largest[h][n] = told.largest(h, n, 0);
      a.rescale(h, n, followed(a.largest[h][n], a.m[h][n]));
      weigh_row(a, c[h][n], h, n, x);
    }
  if constexpr (PROBE) {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        told.tell(h, n, 1, sum_of_row(x.d1[h][n]));
        told.tell(h, n, 2, sum_of_row(x.d2[h][n]));
        told.tell(h, n, 3, sum_of_row(x.spread[h][n]));
      }
    barrier_sync(tile.barrier(), 128);
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        // No other row's call is a reason.
        bool called = false;
#pragma unroll
        for (int w = 0; w < STEP_WARPS; w++) called = moves(told.of(w, h, n, 1), told.of(w, h, n, 2), told.of(w, h, n, 3)) || called;
        if (!called) continue;
        const float d1 = told.sum(h, n, 1);
        float d2 = told.sum(h, n, 2), spread = told.sum(h, n, 3);
        if (moves(d1, d2, spread)) {
          const float step = d2 / d1;
          a.shift(h, n, step);
          weigh_row(a, c[h][n], h, n, x);
          d2 -= step * d1, spread = 0;
        }
        // All lanes have the same share of what is there so far: none calls again for what all know.
        constexpr float SHARE = 1.f / 32;
        x.d1[h][n] = d1 * SHARE, x.d2[h][n] = d2 * SHARE, x.spread[h][n] = spread * SHARE;
      }
  }
  if constexpr (PROBE && !BFLOAT) {
#ifdef FOR_RACECHECK
    // Number 0 is loaded with the others, a vector, and made nothing of.
    barrier_sync(tile.barrier(), 128);
#endif
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) told.tell(h, n, 0, largest_of_row(fmaxf(fabsf(x.w[h][n][1]), fabsf(x.w[h][n][3]))));
    barrier_sync(tile.barrier(), 128);
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) fit_row(a, x.w[h][n], h, n, told.largest(h, n, 0));
  }
  tile.put(x.w, lane);
  fence_async_proxy();
  barrier_sync(tile.barrier(), 128);
}
