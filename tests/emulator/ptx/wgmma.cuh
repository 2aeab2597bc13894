#pragma once
#include "ptx/numbers.cuh"

inline void wgmma_fence() {}
inline void wgmma_arrived(float&) {}
inline void wgmma_commit() { emulator::running->products.commit(); }
template <int PENDING>
void wgmma_wait() {
  emulator::running->products.wait(PENDING);
  // Products are the whole warpgroup's: none goes on before all have read their operands.
  emulator::meet(emulator::block().barriers[100 + emulator::running->index / 128], 128);
}

// Operands whose rows are keys of 64 half-precision channels, 128 bytes whose 16-byte pieces are swapped by the key.
inline unsigned long long keys_outermost(unsigned address, unsigned block_bytes) {
  return static_cast<unsigned long long>(block_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}
inline constexpr unsigned descriptor_step(unsigned bytes) { return bytes >> 4; }

inline half_bits bits_at(const unsigned char* shared, unsigned long long descriptor, int key, int channel) {
  const unsigned base = (descriptor & 0x3fff) << 4, block_bytes = (descriptor >> 16 & 0x3fff) << 4;
  const unsigned at = base + channel / 64 * block_bytes + key * 128 + ((channel % 64 / 8 ^ key % 8) << 4) + channel % 8 * 2;
  half_bits x;
  memcpy(&x, shared + at, 2);
  return x;
}
inline float operand_at(const unsigned char* shared, unsigned long long descriptor, int key, int channel) {
  return widen<false>(bits_at(shared, descriptor, key, channel));
}

// Of rows whose channels are summed over; a descriptor may begin some pieces after a row's start.
inline half_bits along_row(const unsigned char* shared, unsigned long long descriptor, int row, int channel) {
  const unsigned at = ((descriptor & 0x3fff) << 4) + row * 128 + channel * 2;
  half_bits x;
  memcpy(&x, shared + (at ^ at / 128 % 8 * 16), 2);
  return x;
}
inline unsigned long long channels_innermost(unsigned address) { return (address & 0x3ffff) >> 4; }

// left(row, k) times right(column, k), summed over 16 k.
template <class Left, class Right>
void wgmma(const std::vector<float*>& c, bool add, Left left, Right right) {
  const int thread = emulator::running->index % 128, lane = thread % 32, first = thread / 32 * 16 + lane / 4;
  emulator::running->products.add([=] {
    double a[2][16], b[16], terms[17];
    for (int k = 0; k < 16; k++) a[0][k] = left(first, k), a[1][k] = left(first + 8, k);
    for (int i = 0; i < int(c.size()); i += 4)
      for (int e = 0; e < 2; e++) {
        for (int k = 0; k < 16; k++) b[k] = right(i / 4 * 8 + 2 * (lane % 4) + e, k);
        for (int below = 0; below < 2; below++) {
          float& sum = *c[i + 2 * below + e];
          terms[16] = add ? sum : 0;
          for (int k = 0; k < 16; k++) terms[k] = a[below][k] * b[k];
          sum = truncated_sum(terms);
        }
      }
  });
}
inline std::vector<float*> each(float* c, int count) {
  std::vector<float*> all;
  for (int i = 0; i < count; i++) all.push_back(c + i);
  return all;
}
inline void wgmma_of_keys(float* c, unsigned long long a, unsigned long long b, int columns) {
  const unsigned char* shared = emulator::block().shared;
  const auto of = [shared](unsigned long long operand) {
    return [=](int channel, int k) { return operand_at(shared, operand, k, channel); };
  };
  wgmma(each(c, columns / 2), true, of(a), of(b));
}
inline void wgmma_m64n128(float* c, unsigned long long a, unsigned long long b) { wgmma_of_keys(c, a, b, 128); }
inline void wgmma_m64n192(float* c, unsigned long long a, unsigned long long b) { wgmma_of_keys(c, a, b, 192); }
template <bool BFLOAT>
void wgmma_scores(float (&c)[4], unsigned long long a, unsigned long long b, bool add) {
  const unsigned char* shared = emulator::block().shared;
  const auto of = [shared](unsigned long long operand) {
    return [=](int row, int k) { return widen<BFLOAT>(along_row(shared, operand, row, k)); };
  };
  wgmma(each(c, 4), add, of(a), of(b));
}
template <int COLUMNS, bool BFLOAT, bool OVER_KEYS>
void wgmma_small(float* const (&c)[COLUMNS / 2], unsigned long long a, unsigned long long b, bool add) {
  const unsigned char* shared = emulator::block().shared;
  const auto left = [=](int row, int k) {
    return widen<BFLOAT>(OVER_KEYS ? bits_at(shared, a, k, row) : along_row(shared, a, row, k));
  };
  wgmma({c, c + COLUMNS / 2}, add, left, [=](int column, int k) { return widen<BFLOAT>(along_row(shared, b, column, k)); });
}
