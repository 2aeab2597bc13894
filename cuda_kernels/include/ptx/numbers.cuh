#pragma once
// Half-precision numbers as bits, without the toolkit's headers, and the fast exponential.

typedef unsigned short half_bits;

template <bool BFLOAT>
__device__ __forceinline__ float widen(half_bits x) {
  float y;
  if constexpr (BFLOAT)
    y = __uint_as_float(static_cast<unsigned>(x) << 16);
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

template <bool BFLOAT>
__device__ __forceinline__ float2 widen_pair(unsigned x) {
  if constexpr (BFLOAT) return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  return {widen<BFLOAT>(x & 0xffff), widen<BFLOAT>(x >> 16)};
}

template <bool BFLOAT>
__device__ __forceinline__ half_bits narrow(float x) {
  half_bits y;
  if constexpr (BFLOAT)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

template <bool BFLOAT>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  unsigned y;
  if constexpr (BFLOAT)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Of two pairs of float16, or of bfloat16, each result rounded.
__device__ __forceinline__ unsigned subtract_pairs(unsigned a, unsigned b) {
  unsigned y;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

template <bool BFLOAT>
__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b) {
  unsigned y;
  if constexpr (BFLOAT)
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Of pairs of bfloat16, a b + c, rounded once.
__device__ __forceinline__ unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
  unsigned y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// NaN only of two.
template <bool BFLOAT>
__device__ __forceinline__ unsigned larger_pairs(unsigned a, unsigned b) {
  unsigned y;
  if constexpr (BFLOAT)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// 2^x to 2 units in the last place; NaN of NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To one unit in the last place.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float square_root_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }
