#pragma once
// The running state of a query row over the keys seen so far, and its merges: docs/math.md, "One pass over the keys".
// Scores are in units of log 2. d2 and O2 are relative to the shift t0 of the probe scores.

#include "shape.cuh"

struct Statistics {
  float m, d1, d2, t0;
  __device__ static Statistics none() { return {minus_infinity(), 0, 0, 0}; }
  __device__ static Statistics of(const float4& x) { return {x.x, x.y, x.z, x.w}; }
  __device__ float4 packed() const { return make_float4(m, d1, d2, t0); }
  // d1 is NaN, not 0, in a row that saw a score of NaN.
  __device__ bool saw_nothing() const { return d1 == 0; }
};

// 2^(x - m); scores that are all -inf so far weigh nothing, against their own maximum they would be NaN.
__device__ __forceinline__ float weight(float x, float m) { return exp2_fast(x - (m == minus_infinity() ? 0.f : m)); }

// The state of a row, with its sums in WIDTH channels.
template <int WIDTH>
struct RowState {
  Statistics s;
  float O1[WIDTH], O2[WIDTH];

  __device__ void clear() {
    s = Statistics::none();
#pragma unroll
    for (int e = 0; e < WIDTH; e++) O1[e] = O2[e] = 0;
  }

  // Adds COUNT states at once, of which those that saw nothing count for nothing. empty: whether this one is known to have
  // seen nothing.
  template <int COUNT>
  __device__ __forceinline__ void add(const Statistics (&x)[COUNT], const float2 (&sums)[COUNT][WIDTH], bool empty = false) {
    bool all = empty || !s.saw_nothing();
#pragma unroll
    for (int u = 0; u < COUNT; u++) all = all && !x[u].saw_nothing();
    // Nearly always, and then without a look at each.
    if (all)
      add_these<true>(x, sums, empty);
    else
      add_these<false>(x, sums, empty);
  }

 private:
  // ALL: whether all of them, and this one unless it is empty, saw something.
  template <bool ALL, int COUNT>
  __device__ __forceinline__ void add_these(const Statistics (&x)[COUNT], const float2 (&sums)[COUNT][WIDTH], bool empty) {
    empty = empty || (!ALL && s.saw_nothing());
    float m = empty ? minus_infinity() : s.m;
#pragma unroll
    for (int u = 0; u < COUNT; u++) m = !ALL && x[u].saw_nothing() ? m : fmaxf(m, x[u].m);
    // The first state that saw a key gives the shift, all others move to it.
    bool shifted = !empty;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
      if (!shifted && (ALL || !x[u].saw_nothing())) s.t0 = x[u].t0;
      shifted = shifted || ALL || !x[u].saw_nothing();
    }
    const float own = empty ? 0.f : weight(s.m, m);
    s.m = m, s.d1 = empty ? 0.f : s.d1 * own, s.d2 = empty ? 0.f : s.d2 * own;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) O1[e] = empty ? 0.f : O1[e] * own, O2[e] = empty ? 0.f : O2[e] * own;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
      if (!ALL && x[u].saw_nothing()) continue;
      const float factor = weight(x[u].m, m), step = x[u].t0 - s.t0;
      s.d1 += factor * x[u].d1, s.d2 += factor * (x[u].d2 + step * x[u].d1);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) O1[e] += factor * sums[u][e].x, O2[e] += factor * (sums[u][e].y + step * sums[u][e].x);
    }
  }
};
