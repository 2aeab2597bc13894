#pragma once
typedef unsigned short half_bits;

template <bool BFLOAT>
float widen(half_bits x) {
  if constexpr (BFLOAT) return __uint_as_float(static_cast<unsigned>(x) << 16);
  return same_bits<_Float16>(x);
}
template <bool BFLOAT>
half_bits narrow(float x) {
  if constexpr (!BFLOAT) return same_bits<half_bits>(static_cast<_Float16>(x));
  const unsigned bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool BFLOAT>
float2 widen_pair(unsigned x) { return {widen<BFLOAT>(x & 0xffff), widen<BFLOAT>(x >> 16)}; }
template <bool BFLOAT>
unsigned narrow_pair(float low, float high) { return narrow<BFLOAT>(low) | static_cast<unsigned>(narrow<BFLOAT>(high)) << 16; }

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float square_root_fast(float x) { return sqrtf(x); }
inline float minus_infinity() { return __uint_as_float(0xff800000u); }
inline float quiet_nan() { return __uint_as_float(0x7fc00000u); }
