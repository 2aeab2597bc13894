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

// Of float16, by a number that holds the result before it is rounded.
template <class Operation>
unsigned of_pairs(unsigned a, unsigned b, Operation operation) {
  const auto half = [&](int shift) {
    const double x = same_bits<_Float16>(static_cast<half_bits>(a >> shift)), y = same_bits<_Float16>(static_cast<half_bits>(b >> shift));
    return unsigned(same_bits<half_bits>(static_cast<_Float16>(operation(x, y)))) << shift;
  };
  return half(0) | half(16);
}
inline unsigned subtract_pairs(unsigned a, unsigned b) { return of_pairs(a, b, [](double x, double y) { return x - y; }); }
template <bool BFLOAT>
unsigned multiply_pairs(unsigned a, unsigned b) {
  if constexpr (!BFLOAT) return of_pairs(a, b, [](double x, double y) { return x * y; });
  const float2 x = widen_pair<true>(a), y = widen_pair<true>(b);
  return narrow_pair<true>(x.x * y.x, x.y * y.y);
}

inline unsigned multiply_add_pairs(unsigned a, unsigned b, unsigned c) {
  const float2 x = widen_pair<true>(a), y = widen_pair<true>(b), z = widen_pair<true>(c);
  return narrow_pair<true>(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
template <bool BFLOAT>
unsigned larger_pairs(unsigned a, unsigned b) {
  const float2 x = widen_pair<BFLOAT>(a), y = widen_pair<BFLOAT>(b);
  return narrow_pair<BFLOAT>(std::fmax(x.x, y.x), std::fmax(x.y, y.y));
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float square_root_fast(float x) { return sqrtf(x); }
inline float minus_infinity() { return __uint_as_float(0xff800000u); }
inline float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// A sum as the tensor cores of Hopper take it: numbers are aligned with the largest of them, two bits beyond those of a
// float are kept and the rest cut off, and so are at last the bits that a float lacks (Fasi, Higham, Mikaitis and
// Pranesh, "Numerical behavior of NVIDIA tensor cores", and its sequels).
template <int N>
float truncated_sum(const double (&terms)[N]) {
  double largest = 0, sum = 0;
  for (double x : terms) {
    sum += x;
    largest = std::max(largest, std::fabs(x));
  }
  if (!(std::fabs(sum) < 1e38) || largest == 0) return float(sum);
  int exponent;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - 26), inverse = std::ldexp(1.0, 26 - exponent);
  long long units = 0;
  for (double x : terms) units += static_cast<long long>(x * inverse);
  sum = units * unit;
  const float rounded = float(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f) : rounded;
}
