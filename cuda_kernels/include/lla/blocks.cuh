#pragma once
// Blocks of 16 x 16 numbers over a warp: their factors and their products on tensor cores, each number as two of tf32, which is
// nearly float32.

#include "ptx/mma.cuh"
#include "ptx/numbers.cuh"
#include "ptx/opaque.cuh"

constexpr int BLOCK = 16;

// A block of 16 x 16 over a warp, as the tensor cores have an accumulator: rows g and g + 8 (g = lane / 4); columns
// 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t (t = lane % 4). As an operand, columns 2 t and 2 t + 1 stand for t and t + 4 of
// their eight: a sum may be taken in any order.
struct Tile {
  float x[2][4];

  __device__ __forceinline__ static int offset(int pitch) {
    const int lane = thread_index() % 32;
    return lane / 4 * pitch + lane % 4 * 2;
  }

  __device__ __forceinline__ void load(const float* block, int pitch) {
    block += offset(pitch);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const float2 pair = *reinterpret_cast<const float2*>(block + h * 8 * pitch + s * 8);
        x[h][2 * s] = pair.x, x[h][2 * s + 1] = pair.y;
      }
  }

  __device__ __forceinline__ void store(float* block, int pitch) const {
    block += offset(pitch);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int s = 0; s < 2; s++)
        *reinterpret_cast<float2*>(block + h * 8 * pitch + s * 8) = {x[h][2 * s], x[h][2 * s + 1]};
  }

  __device__ __forceinline__ void subtract(const Tile& other) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[h][e] -= other.x[h][e];
  }

  // Becomes L^-1 for L L^T = the tile, in place. Two pivots at a time, for the latency of one: of (a b; b c) the
  // second is c - b^2 / a, and its inverse does not wait for that of a. The root of a negative one makes all NaN.
  __device__ __forceinline__ void factor() {
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    float inverse_pivots[2] = {};  // of this lane's rows
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float(&pivots)[4] = x[half];
#pragma unroll 1
      for (int quad = 0; quad < 4; quad++) {
        const int first = 2 * quad, second = first + 1;
        const float a = __shfl_sync(~0u, pivots[2 * half], first * 4 + quad);
        const float c = __shfl_sync(~0u, pivots[2 * half + 1], second * 4 + quad);
        const float b = __shfl_sync(~0u, pivots[2 * half + 1], first * 4 + quad);
        const float inverse_a = reciprocal_fast(a), inverse_determinant = reciprocal_fast(a * c - b * b);
        float l[2][2], rows[2][4];
#pragma unroll
        for (int h = half; h < 2; h++)
#pragma unroll
          for (int e = 0; e < 2; e++) l[h][e] = __shfl_sync(~0u, x[h][2 * half + e], lane / 4 * 4 + quad);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
          for (int e = 0; e < 4; e++) rows[r][e] = __shfl_sync(~0u, pivots[e], (first + r) * 4 + t);
        const float ratio = b * inverse_a;
        if (g == first) inverse_pivots[half] = inverse_a;
        if (g == second) inverse_pivots[half] = a * inverse_determinant;
#pragma unroll
        for (int e = 0; e < 4; e++) rows[1][e] -= ratio * rows[0][e];
#pragma unroll
        for (int h = half; h < 2; h++) {
          const bool below_first = h > half || g > first, below_second = h > half || g > second;
          const float upper = below_first ? l[h][0] * inverse_a : 0.0f;
          const float lower = (l[h][1] - ratio * l[h][0]) * (below_second ? a : 0.0f) * inverse_determinant;
#pragma unroll
          for (int e = 0; e < 4; e++) x[h][e] = x[h][e] - upper * rows[0][e] - lower * rows[1][e];
          // The pivots' columns are done with; what an identity beside the tile would have become goes there.
          if (t == quad) x[h][2 * half] = lower * ratio - upper, x[h][2 * half + 1] = -lower;
        }
      }
    }
    x[0][2] = x[0][3] = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float root = square_root_fast(inverse_pivots[h]);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool diagonal = g + 8 * h == t * 2 + e % 2 + e / 2 * 8;
        x[h][e] = diagonal ? root : x[h][e] * root;
      }
    }
  }
};

// A tile as high + low: the nearest that tf32 holds, and the rest, of which the tensor cores keep as many bits again.
struct Operand {
  Tile high, low;

  __device__ __forceinline__ explicit Operand(const Tile& tile) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float x = tile.x[h][e];
        high.x[h][e] = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
        low.x[h][e] = x - high.x[h][e];
      }
  }
};

// A B^T; the products of two low parts, 2^-24 of the whole, are left out.
__device__ __forceinline__ Tile multiply(const Operand& a, const Operand& b) {
  Tile large = {}, first = {}, second = {};
  auto add = [](Tile& c, const Tile& a, const Tile& b, int column, int step) {
    multiply_add_tf32(c.x[0][2 * column], c.x[0][2 * column + 1], c.x[1][2 * column], c.x[1][2 * column + 1],
                      a.x[0][2 * step], a.x[1][2 * step], a.x[0][2 * step + 1], a.x[1][2 * step + 1],
                      b.x[column][2 * step], b.x[column][2 * step + 1]);
  };
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      add(large, a.high, b.high, column, step);
      add(first, a.high, b.low, column, step);
      add(second, a.low, b.high, column, step);
    }
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int e = 0; e < 4; e++) large.x[h][e] += first.x[h][e] + second.x[h][e];
  return large;
}
