#pragma once
// Where conjugate gradients are, and a step from there.

#include "lla/progress.cuh"
#include "lla/vectors.cuh"

// The slope, its residual, the direction that led there, and the product with that.
struct Iterate {
  Entries x = {}, r, p = {}, s = {};
  Progress progress;

  // Without a ridge no slope is near enough.
  __device__ __forceinline__ Iterate(const Entries& right, float ridge) : r(right), progress(ridge) {
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) r.of[e] = ridge > 0.0f ? r.of[e] : quiet_nan();
  }

  // Takes a step. product: of the moments with the residual; curvature: the inner product of the two.
  __device__ __forceinline__ void advance(const Entries& product, float curvature, float ridge) {
    progress.advance(__fmaf_rn(ridge, progress.gamma, curvature), ridge);
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
      const float w = __fmaf_rn(ridge, r.of[e], product.of[e]);
      s.of[e] = __fmaf_rn(progress.beta, s.of[e], w);
      p.of[e] = __fmaf_rn(progress.beta, p.of[e], r.of[e]);
      x.of[e] = __fmaf_rn(progress.alpha, p.of[e], x.of[e]);
      r.of[e] = __fmaf_rn(-progress.alpha, s.of[e], r.of[e]);
    }
  }
};

// Of the ridge system, by its product with the slope x.
__device__ __forceinline__ Entries residual_of(const Entries& right, float ridge, const Entries& x, const Entries& product) {
  Entries residual;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) residual.of[e] = right.of[e] - __fmaf_rn(ridge, x.of[e], product.of[e]);
  return residual;
}
