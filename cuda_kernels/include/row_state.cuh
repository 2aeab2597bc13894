#pragma once
// The running state of a query row over the keys seen so far, and the merge of two: docs/math.md, "One pass over
// the keys". Scores are in units of log 2. d2 and O2 are relative to the shift t0 of the probe scores.

#include "ptx/numbers.cuh"

struct Statistics {
  float m, d1, d2, t0;
  __device__ static Statistics none() { return {minus_infinity(), 0, 0, 0}; }
  // d1 is NaN, not 0, in a row that saw a score of NaN.
  __device__ bool saw_nothing() const { return d1 == 0; }
};

// 2^(x - m); scores that are all -inf so far weigh nothing, against their own maximum they would be NaN.
__device__ __forceinline__ float weight(float x, float m) { return exp2_fast(x - (m == minus_infinity() ? 0.f : m)); }
