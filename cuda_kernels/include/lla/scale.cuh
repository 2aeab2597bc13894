#pragma once
// What X is scaled by, a power of two that brings keys or values to the range of float16, and the weights of scores.

#include "lla/inputs.cuh"
#include "ptx/numbers.cuh"

// Of a key's weight.
__device__ __forceinline__ float root_of(float score, float half_shift) { return exp2_fast(0.5f * score - half_shift); }

// Twice, rounded as X is multiplied by it.
__device__ __forceinline__ unsigned roots_of(float score, float half_shift) {
  const float root = root_of(score, half_shift);
  return narrow_pair<false>(root, root);
}

// X of two numbers as they came. scales: for each, as the numbers are; origin, roots: in float16, what is subtracted when they are
// scaled, and the roots of their weights. SCALED: whether the scales are not 1.
template <bool SCALED>
__device__ __forceinline__ unsigned x_of_pair(unsigned raw, unsigned scales, unsigned origin, unsigned roots) {
  if constexpr (SCALED) raw = multiply_pairs<BFLOAT>(raw, scales);
  if constexpr (BFLOAT) {
    const float2 wide = widen_pair<true>(raw);
    raw = narrow_pair<false>(wide.x, wide.y);
  }
  return multiply_pairs<false>(subtract_pairs(raw, origin), roots);
}

// The largest that the lanes have, in every lane; NaN is none.
__device__ __forceinline__ float largest_of_lanes(float2 a) {
  // Integers of the same order, of which the lanes find the largest in one instruction.
  const int bits = __float_as_int(fmaxf(fmaxf(minus_infinity(), a.x), a.y));
  const int largest = __reduce_max_sync(~0u, bits < 0 ? bits ^ 0x7fffffff : bits);
  return __int_as_float(largest < 0 ? largest ^ 0x7fffffff : largest);
}

// The largest of 8 numbers.
__device__ __forceinline__ float largest_of(uint4 raw) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float2 x = widen_pair<BFLOAT>(words[e]);
    // Neither NaN nor an infinity, which no scale saves.
    if (fabsf(x.x) < -minus_infinity()) largest = fmaxf(largest, fabsf(x.x));
    if (fabsf(x.y) < -minus_infinity()) largest = fmaxf(largest, fabsf(x.y));
  }
  return largest;
}

// The exponent that leaves later numbers room to be larger; and the largest one, where float16 has room for a weight's root
// of at most 16 times a number at most twice the largest from the origin.
constexpr int ROOMY = 3, TIGHT = 9;

// The power of two that scales a largest number, of these bits, to between 2^exponent and twice that, or 1 where that will do;
// `otherwise` if the number is 0.
__device__ __forceinline__ float scale_of(unsigned bits, int exponent, float otherwise) {
  const int own = bits >> 23;
  // The exponent of the scale; that of its inverse is 254 less it. Float16 has no larger scale than 2^15, and needs none.
  constexpr int SMALLEST = 127 - (BFLOAT ? 127 : 14), LARGEST = 127 + (BFLOAT ? 100 : 15);
  // In a second pass too: a row whose sums one NaN made NaN keeps the bits of its other channels.
  const bool is_near_1 = own >= 127 - 2 && own < 127 + 7;
  const int power = is_near_1 ? 127 : max(min(254 + exponent - own, LARGEST), SMALLEST);
  return bits ? __uint_as_float(power << 23) : otherwise;
}

// 1 over a power of two or, as scale_of may have it, over 0.
__device__ __forceinline__ float inverse_of_scale(float scale) {
  return scale == 0.0f ? -minus_infinity() : __uint_as_float((254u << 23) - __float_as_uint(scale));
}

// The factor that brings moments relative to the maximum m to the maximum `to`.
__device__ __forceinline__ float rescaling(float m, float to) {
  return to == minus_infinity() ? 1.0f : exp2_fast(m - to);
}

// Of weights that may all be 0.
__device__ __forceinline__ float inverse_weight(float d1) { return d1 == 0.0f ? 0.0f : 1.0f / d1; }

// What a lane subtracts from its 8 columns, from `column` on, scaled as they are, in pairs.
__device__ __forceinline__ void read_origin(const float* origin_of_columns, int column, float scale, unsigned (&origin)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++)
    origin[e] = narrow_pair<false>(scale * origin_of_columns[column + 2 * e], scale * origin_of_columns[column + 2 * e + 1]);
}
