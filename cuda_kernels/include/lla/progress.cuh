#pragma once
// The numbers of a step of conjugate gradients, and when their error is small enough.
//
// In the form of Chronopoulos and Gear (J. Comput. Appl. Math. 25, 1989), whose two sums of a step are one. It ends where
// the error is known to be small: the Gauss-Radau quadrature of Meurant and Tichy (Numer. Algorithms 62, 2013), with the
// ridge below all eigenvalues, bounds the error's energy norm. By the inequality of Cauchy and Schwarz that bounds
// the error of every channel of the output, in standard deviations of the values.

#include "lla/inputs.cuh"
#include "ptx/numbers.cuh"

// Of what the slope adds to an output: a quarter of its last bit in bfloat16, and that bit in float16.
constexpr float TOLERANCE = BFLOAT ? 1.0f / 2048 : 1.0f / 4096;

// The numbers of a step that are the same in all threads.
struct Progress {
  float gamma = 0.0f, inverse_gamma = 0.0f;  // the residual's square
  float curvature = 0.0f, alpha = 0.0f, beta = 0.0f;
  float radau;  // the bound of the squared error over the residual's square
  // Of the slope u and the direction p: u (C_kk + ridge I) u, u u, u p and p p.
  float energy = 0.0f, slope_square = 0.0f, slope_direction = 0.0f, direction_square = 0.0f;

  Progress() = default;
  __device__ __forceinline__ explicit Progress(float ridge) : radau(reciprocal_fast(ridge)) {}

  __device__ __forceinline__ void look(float square, float ridge) {
    gamma = square;
    beta = __fmul_rn(gamma, inverse_gamma);
    const float left = __fsub_rn(radau, alpha);
    // Rounding may leave nothing of it: the residual's own bound then.
    const bool is_left = left > 0.0f;
    radau = __fmul_rn(is_left ? left : 1.0f, reciprocal_fast(is_left ? __fmaf_rn(ridge, left, beta) : ridge));
  }

  // Whether a squared residual makes no error of more than `tolerance` times what the slope adds to the output.
  __device__ __forceinline__ bool is_small(float square, float ridge, float tolerance) const {
    return __fmul_rn(radau, square) <= __fmul_rn(tolerance * tolerance, __fmaf_rn(-ridge, slope_square, energy));
  }

  __device__ __forceinline__ void advance(float delta) {
    const float beta_square = __fmul_rn(beta, beta);
    curvature = __fmaf_rn(-beta_square, curvature, delta);
    alpha = __fmul_rn(gamma, reciprocal_fast(curvature));
    inverse_gamma = reciprocal_fast(gamma);
    energy = __fmaf_rn(alpha, gamma, energy);
    // Residuals are orthogonal to the slope and to the directions before.
    direction_square = __fmaf_rn(beta_square, direction_square, gamma);
    slope_direction = __fmul_rn(beta, slope_direction);
    const float moved = __fmul_rn(alpha, direction_square);
    slope_square = __fmaf_rn(alpha, __fmaf_rn(2.0f, slope_direction, moved), slope_square);
    slope_direction = __fadd_rn(slope_direction, moved);
  }
};
