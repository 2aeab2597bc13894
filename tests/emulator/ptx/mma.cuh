#pragma once
#include "ptx/numbers.cuh"

// Eight rows of eight half-precision numbers: lane 8 i + j gives the address of row j of matrix i.
inline void load_rows(unsigned (&a)[4], unsigned address, bool transposed) {
  const auto given = emulator::give(address);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; i++) {
    half_bits pair[2];
    for (int e = 0; e < 2; e++) {
      const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
      memcpy(&pair[e], emulator::at(given.of(8 * i + row)) + 2 * column, 2);
    }
    a[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}
inline void load_matrices(unsigned (&a)[4], unsigned address) { load_rows(a, address, false); }
inline void load_matrices_transposed(unsigned (&a)[4], unsigned address) { load_rows(a, address, true); }

inline void store_matrices_transposed(unsigned address, const unsigned (&a)[4]) {
  const auto given = emulator::give(address);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++) {
      const half_bits x = a[i] >> 16 * e & 0xffff;
      memcpy(emulator::at(given.of(8 * i + lane % 4 * 2 + e)) + 2 * (lane / 4), &x, 2);
    }
}

inline unsigned transpose_matrix(unsigned a) {
  const auto given = emulator::give(a);
  const int row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  const auto element = [&](int i, int j) { return given.of(i * 4 + j / 2) >> j % 2 * 16 & 0xffff; };
  return element(column, row) | element(column + 1, row) << 16;
}

// The product of fragments of 16 x K and K x 8, K numbers of a row side by side in registers of PER of them.
template <int K, int PER>
void multiply_fragments(float& c0, float& c1, float& c2, float& c3, const float (&a)[4 * PER], const float (&b)[2 * PER]) {
  struct Operands {
    float a[4 * PER], b[2 * PER];
  } own;
  memcpy(own.a, a, sizeof a), memcpy(own.b, b, sizeof b);
  const auto given = emulator::give(own);
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  float* c[4] = {&c0, &c1, &c2, &c3};
  for (int e = 0; e < 4; e++) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    double terms[K + 1];
    terms[K] = *c[e];
    for (int k = 0; k < K; k++) {
      const int lane = k % (K / 2) / PER, register_ = k / (K / 2);
      const Operands left = given.of(row % 8 * 4 + lane), right = given.of(column * 4 + lane);
      terms[k] = double(left.a[(row / 8 + 2 * register_) * PER + k % PER]) * right.b[register_ * PER + k % PER];
    }
    *c[e] = truncated_sum(terms);
  }
}

template <bool BFLOAT>
void multiply_add(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const auto both = [](unsigned x, float* to) {
    const float2 pair = widen_pair<BFLOAT>(x);
    to[0] = pair.x, to[1] = pair.y;
  };
  float left[8], right[4];
  for (int i = 0; i < 4; i++) both(a[i], left + 2 * i);
  both(b0, right), both(b1, right + 2);
  multiply_fragments<16, 2>(c0, c1, c2, c3, left, right);
}

inline float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }
inline void multiply_add_tf32(float& c0, float& c1, float& c2, float& c3, float a0, float a1, float a2, float a3, float b0, float b1) {
  const float left[4] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3)}, right[2] = {tf32(b0), tf32(b1)};
  multiply_fragments<8, 1>(c0, c1, c2, c3, left, right);
}
