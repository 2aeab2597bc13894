#pragma once
// The numbers of a step of conjugate gradients, and when their error is small enough.
//
// In the form of Chronopoulos and Gear (J. Comput. Appl. Math. 25, 1989), whose two sums of a step are one. It ends where
// the error is known to be small: the Gauss-Radau quadrature of Meurant and Tichy (Numer. Algorithms 62, 2013), with the
// ridge below all eigenvalues, bounds the error's energy norm. By the inequality of Cauchy and Schwarz that bounds
// the error of every channel of the output, in standard deviations of the values.
//
// A block that has its row to itself has a step's product when it knows how large the residual was before it. So it takes the step in any
// case, and ends with it if what is left is small, as the residual fell in the last two.
//
// Blocks that share a row's steps end before the product: a step's direction is known before what gives its length. Where steps before it
// were of nearly one length, the last is taken with theirs: a relative error t of the length leaves, of the squared energy norm, t^2 of what
// the step is worth. The product with the slope that this gives, which is wanted anyway to see the true residual, says what t was and
// bounds the error that is left.

#include "lla/inputs.cuh"
#include "ptx/numbers.cuh"

// Of what the slope adds to an output, in standard deviations of the values. Half of what rounds an output of that size, and in bfloat16 a
// quarter where the last step is foreseen, which may leave more: where few keys weigh the output itself may be ten times smaller.
constexpr float TOLERANCE = !BFLOAT ? 1.0f / 4096 : TOGETHER ? 1.0f / 2048 : 1.0f / 1024;
// What is accepted of the slope that steps end with: after one whose length was foreseen, whose error is known closely; and where the
// residual of the recurrences is small. TOLERANCE itself where they end with a step that was thought to leave little.
constexpr float NEAR = 1.25f * TOLERANCE, NEARLY_ROUNDED = 2.0f * TOLERANCE;
// The squared residual, beside the largest there was, that is left of rounding alone, a few times of it: where one key has all but
// nothing of the weight, and the slope is long and adds nothing, no smaller one is to be had, nor by a factorisation in float32.
// Blocks that have heads of 64 and share a row among more than 8 lack the register for it.
constexpr float ROUNDED = D == 64 && SHARERS > 8 ? 0.0f : 0x1p-42f;
// Whether the length of a step is foreseen: where blocks share a row, and exchange its product.
constexpr bool FORESEES = TOGETHER;
// What is thought to be left of the squared residual by a step whose product is there, over what was left by the one of the last two that
// left more: with keys along a few directions it falls by leaps. Where it is more, the row takes more steps, and its slope's product once
// more.
#ifdef FORESEEN_WRONGLY  // for tests: nothing, so that every second step is thought to be the last
constexpr float LESS_FAR = 0.0f;
#else
constexpr float LESS_FAR = 1.25f;
#endif
// What the lengths of the last steps may differ by, and residuals fall by at least, for the next to be foreseen.
constexpr float MOST_CHANGE = 0.3f, MOST_LEFT = 0.5f;
// Of a squared error, what at least is thought to be left by a step that is foreseen.
constexpr float LEAST_LEFT = 1.0f / 64;

// The numbers of a step that are the same in all threads.
struct Progress {
  float gamma = 0.0f, inverse_gamma = 0.0f;  // the residual's square
  float largest = 0.0f;                      // of all of these
  float curvature = 0.0f, alpha = 0.0f, beta = 0.0f;
  float fall = 0.0f;    // what the one of the last two steps that left more of the residual's square left of it
  float radau;          // the bound of the squared error over the residual's square
  float change = 0.0f;  // of the step's length, relative to the last one; of each before that a quarter
  // What the slope u adds to the output, squared, u C_kk u; and with the direction p: u p and p p.
  float added = 0.0f, slope_direction = 0.0f, direction_square = 0.0f;

  __device__ __forceinline__ explicit Progress(float ridge) : radau(reciprocal_fast(ridge)) {}

  // Anew, from a slope that steps led to; no step is foreseen before there were some.
  __device__ __forceinline__ void begin_anew(float ridge) {
    const float by_slope = added, before = largest;
    *this = Progress(ridge);
    added = by_slope, largest = before, change = 1.0f;
  }

  __device__ __forceinline__ void look(float square, float ridge) {
    gamma = square, largest = fmaxf(largest, square);
    const float last = beta;
    beta = __fmul_rn(gamma, inverse_gamma);
    fall = fmaxf(last, beta);
    radau = next_radau(alpha, beta, ridge);
  }

  // After a step of length `alpha`, which leaves `beta` of the residual's square.
  __device__ __forceinline__ float next_radau(float alpha, float beta, float ridge) const {
    const float rest = __fsub_rn(radau, alpha);
    // Rounding may leave nothing of it: the residual's own bound then.
    const bool is_left = rest > 0.0f;
    return __fmul_rn(is_left ? rest : 1.0f, reciprocal_fast(is_left ? __fmaf_rn(ridge, rest, beta) : ridge));
  }

  // Whether the next step can be taken without its product, as long as the last; and how much of the squared error that leaves.
  __device__ __forceinline__ bool is_foreseen() const { return FORESEES && change <= MOST_CHANGE && beta <= MOST_LEFT; }
  __device__ __forceinline__ float left() const { return is_foreseen() ? fmaxf(__fmaf_rn(change, change, beta), LEAST_LEFT) : 1.0f; }
  __device__ __forceinline__ float foreseen_length() const { return is_foreseen() ? alpha : 0.0f; }

  // The residual's square after the next step, if it falls nearly as it did in the last two.
  __device__ __forceinline__ float next_square() const { return beta > 0.0f ? LESS_FAR * fall * gamma : gamma; }

  // Whether a slope is near enough by the square of its true residual, after the step that was taken.
  __device__ __forceinline__ bool is_near_after_step(float square, float ridge, float tolerance) const {
    Progress seen = *this;
    seen.look(square, ridge);
    return seen.is_small(square, tolerance);
  }

  // Whether a squared residual makes no error of more than `tolerance` times what the slope adds to the output, or is left of rounding.
  __device__ __forceinline__ bool is_small(float square, float tolerance) const {
    return __fmul_rn(radau, square) <= __fmul_rn(tolerance * tolerance, added) | is_rounded(square);
  }

  __device__ __forceinline__ bool is_rounded(float square) const { return ROUNDED > 0.0f && square <= __fmul_rn(ROUNDED, largest); }

  // Whether the slope is near enough after the step that was foreseen: by the square of its true residual, and the inner product with
  // the residual before that step. These say how long it should have been, and what residual that would have left.
  __device__ __forceinline__ bool is_near(float square, float with_last, float ridge) const {
    const float length = foreseen_length();
    if (!(length > 0.0f)) return is_small(square, NEARLY_ROUNDED);
    const float inverse = reciprocal_fast(gamma), short_by = __fmul_rn(with_last, inverse);
    const float ratio = reciprocal_fast(__fsub_rn(1.0f, short_by)), beyond = __fsub_rn(ratio, 1.0f);
    const float next = fmaxf(__fmul_rn(ratio * ratio, square) - __fmul_rn(beyond * beyond, gamma), 0.0f);
    const float error = __fmaf_rn(next_radau(length * ratio, next * inverse, ridge), next, length * ratio * short_by * with_last);
    return (short_by < 1.0f && error <= __fmul_rn(NEAR * NEAR, added)) || is_rounded(square);
  }

  __device__ __forceinline__ void advance(float delta, float ridge) {
    const float beta_square = __fmul_rn(beta, beta), last_alpha = alpha;
    // Not nothing, so that where nothing is left of the residual no step is taken.
    curvature = fmaxf(__fmaf_rn(-beta_square, curvature, delta), 0x1p-125f);
    alpha = __fmul_rn(gamma, reciprocal_fast(curvature));
    inverse_gamma = reciprocal_fast(gamma);
    change = fmaxf(fabsf(__fmaf_rn(last_alpha * curvature, inverse_gamma, -1.0f)), 0.25f * change);
    // Residuals are orthogonal to the slope and to the directions before.
    direction_square = __fmaf_rn(beta_square, direction_square, gamma);
    slope_direction = __fmul_rn(beta, slope_direction);
    const float moved = __fmul_rn(alpha, direction_square);
    // Never less than nothing, as rounding would have it where all keys are alike.
    added = fmaxf(__fmaf_rn(alpha, __fmaf_rn(-ridge, __fmaf_rn(2.0f, slope_direction, moved), gamma), added), 0.0f);
    slope_direction = __fadd_rn(slope_direction, moved);
  }
};
