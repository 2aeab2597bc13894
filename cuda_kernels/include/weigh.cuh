#pragma once
// How the scores of a step become weights, and what a lane has of its query rows moves on with them.

#include "row_state.cuh"

// Weights are relative to a number that is seldom the largest score. It begins at 0, and follows the largest score where that is
// further away than LAZY_LOG2: sums may be so many times larger or smaller than they need be. In float16, whose range is small, it
// begins with the first keys, and weights may only grow.
constexpr bool RANGE_IS_SMALL = !BFLOAT && !FLOAT;
constexpr float LAZY_LOG2 = RANGE_IS_SMALL ? 8 : 20;

// Not where nothing was seen, or nothing but NaN: it would move what other rows are relative to.
__device__ __forceinline__ bool is_far(float own, float largest, float m) {
  return RANGE_IS_SMALL ? own > m + LAZY_LOG2 : largest > minus_infinity() && fabsf(largest - m) > LAZY_LOG2;
}

// What a row's weights are to be relative to: its own scores alone decide, and no other row's bits depend on them.
__device__ __forceinline__ float followed(float largest, float m) { return is_far(largest, largest, m) ? largest : m; }

// What a lane accumulates of its query rows.
struct Accumulator {
  float m[HEADS][TILES], t0[HEADS][TILES];
  float largest[HEADS][TILES];               // of the lane's own keys, or the row's when it was last asked for; m follows it
  float d1[HEADS][TILES], d2[HEADS][TILES];  // of the lane's own keys
  float spread[HEADS][TILES];                // sum of p |t - t0| since t0 last moved
  float scale[HEADS][TILES];                 // O2 is kept in units of it where P2 could overflow float16
  float O1[HEADS][TILES][CHANNELS], O2[HEADS][TILES][CHANNELS];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        largest[h][n] = minus_infinity(), m[h][n] = RANGE_IS_SMALL ? minus_infinity() : 0.f;
        t0[h][n] = d1[h][n] = d2[h][n] = spread[h][n] = 0;
        scale[h][n] = 1;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) O1[h][n][i] = O2[h][n][i] = 0;
      }
  }

  // Makes a row's sums relative to another maximum.
  __device__ void rescale(int h, int n, float maximum) {
    // Before the first keys m may lie far above all scores: there is nothing to correct then, but infinity times 0 is NaN.
    const float correction = fminf(weight(m[h][n], maximum), 1e30f);
    d1[h][n] *= correction, d2[h][n] *= correction, spread[h][n] *= correction;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) O1[h][n][i] *= correction, O2[h][n][i] *= correction;
    m[h][n] = maximum;
  }

  // Moves a row's shift on, and what is summed up to it.
  __device__ void shift(int h, int n, float step) {
    const float scaled = step / scale[h][n];
    t0[h][n] += step;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) O2[h][n][i] -= scaled * O1[h][n][i];
  }
};

// The sum, or the largest, over the lanes that share a query row, in all of them.
__device__ __forceinline__ float sum_of_row(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}
__device__ __forceinline__ float largest_of_row(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// Brings what is summed up to the largest score so far, where that is far. All rows go through each phase together: a phase is a chain of
// dependent instructions as long as its shuffles.
__device__ __forceinline__ void follow_largest(Accumulator& a) {
  float m[HEADS][TILES];
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) m[h][n] = a.largest[h][n];
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) m[h][n] = fmaxf(m[h][n], __shfl_xor_sync(~0u, m[h][n], mask));
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      a.largest[h][n] = m[h][n];  // or lanes of small scores would call again
      a.rescale(h, n, followed(m[h][n], a.m[h][n]));
    }
}

constexpr float LARGEST_P2 = 32768;

// Takes a row's O2 in larger units where P2, of which `largest` is the largest, comes close to what float16 holds.
__device__ __forceinline__ void fit_row(Accumulator& a, float (&c)[4], int h, int n, float largest) {
  if (!(largest > LARGEST_P2 && largest < 3e38f)) return;
  // A power of two, so that nothing is rounded.
  const float factor = exp2f(-ceilf(log2f(largest / (LARGEST_P2 / 2))));
  a.scale[h][n] /= factor;
  c[1] *= factor, c[3] *= factor;
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) a.O2[h][n][i] *= factor;
}

// Keeps P2 within float16: t is not scaled, as scores are.
__device__ __forceinline__ void fit(Accumulator& a, float (&c)[HEADS][TILES][4]) {
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const float inverse = 1 / a.scale[h][n];
      c[h][n][1] *= inverse, c[h][n][3] *= inverse;
      const float own = fmaxf(fabsf(c[h][n][1]), fabsf(c[h][n][3]));
      if (!__any_sync(~0u, own > LARGEST_P2)) continue;
      fit_row(a, c[h][n], h, n, largest_of_row(own));
    }
}

// Whether the mean of t - t0, d2 / d1, is too far from 0. P2 = P1 (t - t0) is about to be rounded: its error is that of P1
// as long as t - t0 is about 1, or more where its rest is kept, and that of t's own spread beyond.
__device__ __forceinline__ bool has_drifted(float d1, float d2, float spread) {
  constexpr float NEAR = WITH_RESTS ? 16 : 1;
  return fabsf(d2) > fmaxf(NEAR * d1, 0.75f * spread);
}

// Whether a row's shift moves. Neither NaN nor infinity moves one: they would reach a row's sums by another way than the formula's.
__device__ __forceinline__ bool moves(float d1, float d2, float spread) { return has_drifted(d1, d2, spread) && fabsf(d2) < 3e38f; }

// Scores of a step become weights, and the running sums move on. c: S1, S2 of key g and of key g + 8, then P1, P2.
template <class Sees>
__device__ __forceinline__ void weigh(Accumulator& a, float (&c)[HEADS][TILES][4], bool masked, Sees sees, float scale_log2) {
  bool grown = false;
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      float(&s)[4] = c[h][n];
      s[0] *= scale_log2, s[2] *= scale_log2;
      if (masked) {
        // What is hidden may be NaN, which a weight of 0 would not silence.
        if (!sees(n, 0)) s[0] = minus_infinity(), s[1] = a.t0[h][n];
        if (!sees(n, 1)) s[2] = minus_infinity(), s[3] = a.t0[h][n];
      }
      const float own = fmaxf(s[0], s[2]);
      a.largest[h][n] = fmaxf(a.largest[h][n], own);
      grown = is_far(own, a.largest[h][n], a.m[h][n]) || grown;
    }
  if (__any_sync(~0u, grown)) follow_largest(a);
  float t[HEADS][TILES][2];  // probe scores
  bool drifted = false;
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      float(&s)[4] = c[h][n];
      t[h][n][0] = s[1], t[h][n][1] = s[3];
      // Scores that are all -inf so far weigh nothing; against their own maximum they would be NaN.
      const float m = a.m[h][n] == minus_infinity() ? 0.f : a.m[h][n];
      s[0] = exp2_fast(s[0] - m), s[2] = exp2_fast(s[2] - m);
      a.d1[h][n] += s[0] + s[2];
      s[1] = s[3] = 0;
      if constexpr (!PROBE) continue;
      s[1] = s[0] * (t[h][n][0] - a.t0[h][n]), s[3] = s[2] * (t[h][n][1] - a.t0[h][n]);
      a.d2[h][n] += s[1] + s[3];
      a.spread[h][n] += fabsf(s[1]) + fabsf(s[3]);
      drifted = drifted || has_drifted(a.d1[h][n], a.d2[h][n], a.spread[h][n]);
    }
  if constexpr (!PROBE || FLOAT) return;
  // A lane whose keys' mean lies too far from t0 calls for a look at the row's.
  if (__any_sync(~0u, drifted)) {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const float d1 = sum_of_row(a.d1[h][n]), d2 = sum_of_row(a.d2[h][n]), spread = sum_of_row(a.spread[h][n]);
        if (!moves(d1, d2, spread)) continue;
        const float step = d2 / d1;
        const bool low = !masked || sees(n, 0), high = !masked || sees(n, 1);
        a.shift(h, n, step);
        a.d2[h][n] -= step * a.d1[h][n];
        a.spread[h][n] = 0;
        c[h][n][1] = low ? c[h][n][0] * (t[h][n][0] - a.t0[h][n]) : 0.f;
        c[h][n][3] = high ? c[h][n][2] * (t[h][n][1] - a.t0[h][n]) : 0.f;
      }
  }
  if constexpr (!BFLOAT) fit(a, c);
}
