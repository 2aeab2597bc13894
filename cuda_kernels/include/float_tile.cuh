#pragma once
// The products of a step in float32, by fused multiply-adds; the same lanes own the same scores as in HalfTile.

#include "shape.cuh"

struct FloatTile {
  const Element* queries;  // q, then r, of every row, in shared memory

  __device__ static int channel(int i, int g) { return i / 4 * 32 + g * 4 + i % 4; }

  __device__ void load(const Element* from, int) { queries = from; }

  __device__ void scores(const char* keys, int lane, float (&c)[HEADS][TILES][4]) const {
    const float4* low = reinterpret_cast<const float4*>(keys + lane / 4 * PITCH);
    const float4* high = reinterpret_cast<const float4*>(keys + (lane / 4 + 8) * PITCH);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      float(&s)[4] = c[0][n];
      s[0] = s[1] = s[2] = s[3] = 0;
      const float4* q = reinterpret_cast<const float4*>(queries + (n * 4 + lane % 4) * QUERY_PITCH);
      const float4* r = q + QUERY_ARRAY / 4;
#pragma unroll 4
      for (int d = 0; d < KEY_COLUMNS / 4; d++) {
        const float4 a = low[d], b = high[d], x = q[d];
        add_product(s[0], a, x), add_product(s[2], b, x);
        if constexpr (PROBE) {
          const float4 y = r[d];
          add_product(s[1], a, y), add_product(s[3], b, y);
        }
      }
    }
  }

  __device__ static void accumulate(const char* values, int lane, const float (&w)[HEADS][TILES][4],
                                    float (&O1)[HEADS][TILES][CHANNELS], float (&O2)[HEADS][TILES][CHANNELS]) {
#pragma unroll 2
    for (int j = 0; j < STEP; j++) {
      const float4* row = reinterpret_cast<const float4*>(values + j * PITCH) + lane / 4;
      const int owner = j % 8 * 4 + lane % 4;
      float p1[TILES], p2[TILES];
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        p1[n] = __shfl_sync(~0u, j < 8 ? w[0][n][0] : w[0][n][2], owner);
        p2[n] = PROBE ? __shfl_sync(~0u, j < 8 ? w[0][n][1] : w[0][n][3], owner) : 0.f;
      }
#pragma unroll
      for (int c = 0; c < VALUE_COLUMNS / 32; c++) {
        const float4 v = row[c * 8];
        const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            O1[0][n][c * 4 + e] += p1[n] * x[e];
            if constexpr (PROBE) O2[0][n][c * 4 + e] += p2[n] * x[e];
          }
      }
    }
  }

 private:
  __device__ static void add_product(float& s, const float4& a, const float4& b) {
    s += a.x * b.x, s += a.y * b.y, s += a.z * b.z, s += a.w * b.w;
  }
};
