#pragma once
// The products of a step in half precision, on the matrix units.
//
// S^T = K Q^T: keys are the rows, and the columns of a product are q0 r0 q1 r1 q2 r2 q3 r3, so that lane
// (g, t) = (lane / 4, lane % 4) holds both scores of query t: c0, c1 of key g and c2, c3 of key g + 8. Weights
// P1, P2 are then a pair of one register, and an 8x8 transpose makes them the second operand of
// O^T = V^T P^T, of which the lane holds O1 and O2 of query t in the channels g and g + 8 of every sixteen.

#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"
#include "shape.cuh"

struct HalfTile {
  static constexpr int DEPTHS = KEY_COLUMNS / 16;
  unsigned q[HEADS][TILES][DEPTHS][2];
  // What a float32 probe is more than its rounding; columns of queries are 0.
  unsigned rest[PROBE == 2 ? HEADS : 1][PROBE == 2 ? TILES : 1][PROBE == 2 ? DEPTHS : 1][2];

  // The channel that accumulator `i` of a lane belongs to.
  __device__ static int channel(int i, int g) { return i / 2 * 16 + i % 2 * 8 + g; }
  // Whether accumulator `i` of all lanes lies within `count` channels from `from`, both multiples of 16.
  __device__ static constexpr bool within(int i, int from, int count) { return i / 2 * 16 >= from && i / 2 * 16 < from + count; }

  // query_row(head, row) and probe_row give the row's address, or null where the block has no such row.
  template <class Queries, class Probes>
  __device__ void load(char*, int lane, Queries query_row, Probes probe_row) {
    const int column = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const int row = n * 4 + column / 2;
        const half_bits* from = column % 2 == 0 ? query_row(h, row) : nullptr;
        const void* probe = PROBE && column % 2 ? probe_row(h, row) : nullptr;
        if (PROBE == 1) from = column % 2 ? static_cast<const half_bits*>(probe) : from;
#pragma unroll
        for (int d = 0; d < DEPTHS; d++)
#pragma unroll
          for (int part = 0; part < 2; part++) {
            const int at = d * 16 + part * 8 + 2 * t;
            if constexpr (PAIRED && PROBE != 2 && KEY_COLUMNS == HEAD_DIM) {
              q[h][n][d][part] = from ? *reinterpret_cast<const unsigned*>(from + at) : 0;
              continue;
            }
            half_bits x[2], low[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const bool there = KEY_COLUMNS == HEAD_DIM || at + e < HEAD_DIM;
              x[e] = there && from ? from[at + e] : half_bits(0);
              low[e] = 0;
              if constexpr (PROBE == 2) {
                if (there && probe) {
                  const float r = static_cast<const float*>(probe)[at + e];
                  x[e] = narrow<BFLOAT>(r);
                  const float difference = r - widen<BFLOAT>(x[e]);
                  // Infinity less itself is no number, and is in x already.
                  low[e] = difference == difference ? narrow<BFLOAT>(difference) : half_bits(0);
                }
              }
            }
            q[h][n][d][part] = x[0] | static_cast<unsigned>(x[1]) << 16;
            if constexpr (PROBE == 2) rest[h][n][d][part] = low[0] | static_cast<unsigned>(low[1]) << 16;
          }
      }
  }

  __device__ void scores(const char* keys, int lane, float (&c)[HEADS][TILES][4]) const {
    const MatrixRow<KEY_BYTES> row(shared_address(keys), lane % 16, lane / 16);
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) c[h][n][0] = c[h][n][1] = c[h][n][2] = c[h][n][3] = 0;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int d = 0; d < DEPTHS; d++) {
        unsigned a[4];
        load_matrices(a, row.at(h * DEPTHS + d));
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          float(&s)[4] = c[h][n];
          multiply_add<BFLOAT>(s[0], s[1], s[2], s[3], a, q[h][n][d][0], q[h][n][d][1]);
          if constexpr (PROBE == 2) multiply_add<BFLOAT>(s[0], s[1], s[2], s[3], a, rest[h][n][d][0], rest[h][n][d][1]);
        }
      }
  }

  // O1 += P1 V and O2 += P2 V; w holds P1, P2 of key g and of key g + 8.
  __device__ static void accumulate(const char* values, int lane, const float (&w)[HEADS][TILES][4],
                                    float (&O1)[HEADS][TILES][CHANNELS], float (&O2)[HEADS][TILES][CHANNELS]) {
    const MatrixRow<VALUE_BYTES> row(shared_address(values), lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      unsigned b[TILES][2];
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        b[n][0] = transpose_matrix(narrow_pair<BFLOAT>(w[h][n][0], w[h][n][1]));
        b[n][1] = transpose_matrix(narrow_pair<BFLOAT>(w[h][n][2], w[h][n][3]));
      }
#pragma unroll
      for (int c = 0; c < VALUE_COLUMNS / 16; c++) {
        unsigned a[4];
        load_matrices_transposed(a, row.at(h * (VALUE_COLUMNS / 16) + c));
#pragma unroll
        for (int n = 0; n < TILES; n++)
          multiply_add<BFLOAT>(O1[h][n][2 * c], O2[h][n][2 * c], O1[h][n][2 * c + 1], O2[h][n][2 * c + 1], a, b[n][0], b[n][1]);
      }
    }
  }
};
