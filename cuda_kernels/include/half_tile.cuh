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
  static constexpr int DEPTHS = KEY_COLUMNS < 16 ? 1 : KEY_COLUMNS / 16;  // fewer columns have only single-precision keys
  static constexpr int PARTS = PROBE == 2 ? 2 : 1;  // a float32 probe, and what it is more than its rounding
  // Of the operands as many depths as fit beside the accumulators stay in registers; others are read again for every step.
  static constexpr bool ROOMY = SINGLE && !VARIED && BLOCKS == 1 && PARTS == 1;
  static constexpr int MOST = ROOMY ? 16 / (HEADS * TILES) : HEADS * TILES * DEPTHS <= 8 ? DEPTHS : 0;
  static constexpr int KEPT = MOST < DEPTHS ? MOST : DEPTHS;
  unsigned operand[PARTS][KEPT ? HEADS : 1][KEPT ? TILES : 1][KEPT ? KEPT : 2][2];
  unsigned address;  // of this lane's row in a matrix load of operands

  // The channel that accumulator `i` of a lane belongs to.
  __device__ static int channel(int i, int g) { return i / 2 * 16 + i % 2 * 8 + g; }

  __device__ void load(const Element* queries, int lane) {
    // Column 2 i of the second operand is query i, column 2 i + 1 its probe; two steps of 16 channels a load.
    const int column = lane % 8;
    address = shared_address(queries + (PROBE ? column % 2 * QUERY_ARRAY : 0) + row_of(column / 2) * QUERY_PITCH + lane / 8 * 8);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
          for (int d = 0; d < KEPT; d += 2) read(part, h, n, d, lane, operand[part][h][n] + d);
  }

  // The operands of the 16 channels from 16 d and of the 16 after them.
  __device__ void read(int part, int h, int n, int d, int lane, unsigned (*to)[2]) const {
    unsigned a[4];
    load_matrices(a, address + ((h * ROWS + n * 4) * QUERY_PITCH + d * 16 + part * QUERY_ARRAY) * 2);
    // Without a probe the odd columns are nothing; the rest of a probe has no even ones.
    const bool odd = lane / 4 % 2, used = part ? odd : PROBE || !odd;
    to[0][0] = used ? a[0] : 0, to[0][1] = used ? a[1] : 0;
    if (d + 1 < DEPTHS) to[1][0] = used ? a[2] : 0, to[1][1] = used ? a[3] : 0;
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
      for (int d = 0; d < DEPTHS; d += 2) {
        unsigned a[2][4];
        load_matrices(a[0], row.at(h * DEPTHS + d));
        if (d + 1 < DEPTHS) load_matrices(a[1], row.at(h * DEPTHS + d + 1));
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
          for (int n = 0; n < TILES; n++) {
            unsigned again[2][2];
            if (d >= KEPT) read(part, h, n, d, lane, again);
            float(&s)[4] = c[h][n];
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (d + e >= DEPTHS) continue;
              const unsigned* b = d < KEPT ? operand[part][h][n][d + e] : again[e];
              multiply_add<BFLOAT>(s[0], s[1], s[2], s[3], a[e], b[0], b[1]);
            }
          }
      }
  }

  // O1 += P1 V and O2 += P2 V; w holds P1, P2 of key g and of key g + 8.
  __device__ static void accumulate(const char* values, int lane, const float (&w)[HEADS][TILES][4],
                                    float (&O1)[HEADS][TILES][CHANNELS], float (&O2)[HEADS][TILES][CHANNELS]) {
    const MatrixRow<VALUE_BYTES> row(shared_address(values), lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      unsigned b[TILES][2], rests[TILES][2];
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float first = w[h][n][2 * half], second = w[h][n][2 * half + 1];
          unsigned rounded = narrow_pair<BFLOAT>(first, second);
          if constexpr (WITH_RESTS) {
            const float2 wide = widen_pair<BFLOAT>(rounded);
            const unsigned rest = narrow_pair<BFLOAT>(first - wide.x, second - wide.y);
            const int copy = lane % 4 / QUERIES;
            if constexpr (RESTS_ASIDE)
              rounded = copy == 0 ? rounded : copy == 1 ? rest : 0;
            else
              rests[n][half] = transpose_matrix(rest);
          }
          b[n][half] = transpose_matrix(rounded);
        }
#pragma unroll
      for (int c = 0; c < VALUE_COLUMNS / 16; c++) {
        unsigned a[4];
        load_matrices_transposed(a, row.at(h * (VALUE_COLUMNS / 16) + c));
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          float &first = O1[h][n][2 * c], &second = O2[h][n][2 * c], &third = O1[h][n][2 * c + 1], &fourth = O2[h][n][2 * c + 1];
          multiply_add<BFLOAT>(first, second, third, fourth, a, b[n][0], b[n][1]);
          if constexpr (WITH_RESTS && !RESTS_ASIDE) multiply_add<BFLOAT>(first, second, third, fourth, a, rests[n][0], rests[n][1]);
        }
      }
    }
  }
};
