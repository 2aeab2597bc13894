#pragma once
// The moments times a vector, on tensor cores, which need no sums over lanes: as they accumulated, the moments lie as such an
// operand does. Numbers are two of bfloat16, which keep 16 bits of them.
//
// All warps have all of each vector, 4 numbers a lane, and do the same with it to the same bits.

#include "lla/accumulators.cuh"
#include "lla/two_pass/shape.cuh"
#include "ptx/mma.cuh"

constexpr int STEPS = D / 16;  // of a product over the matrix's columns
static_assert(STEPS == WARPS && 32 * ENTRIES == D);

struct alignas(16) Entries {
  float of[ENTRIES];
};

// In shared memory numbers lie in the order of lanes and their entries, which is that of the operand's registers.
__device__ __forceinline__ int column_of_entry(int lane, int e) { return lane % STEPS * 16 + e / 2 * 8 + lane / STEPS * 2 + e % 2; }
__device__ __forceinline__ int place_of_row(int row) {
  return (row % 8 / 2 * STEPS + row / 16) * ENTRIES + row % 16 / 8 * 2 + row % 2;
}

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Of all lanes, in each of them and to the same bits.
__device__ __forceinline__ float inner_product(const Entries& x, const Entries& y) {
  float sum = __fmul_rn(x.of[0], y.of[0]);
#pragma unroll
  for (int e = 1; e < ENTRIES; e++) sum = __fmaf_rn(x.of[e], y.of[e], sum);
  return sum_of_lanes(sum);
}

// A pair of numbers in parts, the second of what the first leaves.
__device__ __forceinline__ unsigned split(float2 x, unsigned& low) {
  const unsigned high = narrow_pair<true>(x.x, x.y);
  const float2 rounded = widen_pair<true>(high);
  low = narrow_pair<true>(x.x - rounded.x, x.y - rounded.y);
  return high;
}

// 16 rows of the moments.
struct Matrix {
  unsigned high[D / 4], low[D / 4];

  __device__ __forceinline__ explicit Matrix(const float (&c)[D / 2]) {
#pragma unroll
    for (int e = 0; e < D / 4; e++) high[e] = split({c[2 * e], c[2 * e + 1]}, low[e]);
  }
};

struct Product {
  float2 rows;      // of the warp's rows g and g + 8 (g = lane / 4), in the lanes of which lane % 4 is 0
  float curvature;  // the vector times the product, of these rows, in all lanes
};

__device__ __forceinline__ Product multiply(Shared& shared, const Matrix& matrix, const Entries& x, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  uint2 low, high;
  high.x = split({x.of[0], x.of[1]}, low.x), high.y = split({x.of[2], x.of[3]}, low.y);
  auto& parts = shared.parts[warp];
  reinterpret_cast<uint2*>(parts[0])[lane] = high, reinterpret_cast<uint2*>(parts[1])[lane] = low;
  reinterpret_cast<Entries*>(shared.vectors[warp])[lane] = x;
  __syncwarp();
  // Columns 0 and 1 of the operand are the vector's parts, and the others zeros.
  const unsigned* column = lane < 4 ? parts[0] : lane < 8 ? parts[1] : shared.zeros;
  const uint4* words = reinterpret_cast<const uint4*>(column + lane % 4 * 2 * STEPS);
  float c[4][4] = {};
#pragma unroll
  for (int quad = 0; quad < STEPS / 2; quad++) {
    const uint4 b = words[quad];
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const int step = 2 * quad + s;
      const unsigned b0 = s ? b.z : b.x, b1 = s ? b.w : b.y;
      float(&h)[4] = c[s], (&l)[4] = c[2 + s];
      const unsigned high[4] = {matrix.high[4 * step], matrix.high[4 * step + 1], matrix.high[4 * step + 2], matrix.high[4 * step + 3]};
      const unsigned low[4] = {matrix.low[4 * step], matrix.low[4 * step + 1], matrix.low[4 * step + 2], matrix.low[4 * step + 3]};
      multiply_add<true>(h[0], h[1], h[2], h[3], high, b0, b1);
      multiply_add<true>(l[0], l[1], l[2], l[3], low, b0, b1);
    }
  }
  float sums[4];
#pragma unroll
  for (int e = 0; e < 4; e++) sums[e] = (c[0][e] + c[1][e]) + (c[2][e] + c[3][e]);
  Product product;
  product.rows = {sums[0] + sums[1], sums[2] + sums[3]};
  const int row = warp * 16 + lane / 4;
  const float* vector = shared.vectors[warp];
  // Elsewhere the products are zeros.
  float curvature = vector[place_of_row(row)] * product.rows.x + vector[place_of_row(row + 8)] * product.rows.y;
#pragma unroll
  for (int lanes = 16; lanes >= 4; lanes /= 2) curvature += __shfl_xor_sync(~0u, curvature, lanes);
  product.curvature = curvature;
  return product;
}

// The lane's entries of a product, whose rows all warps have, and its curvature. Read until the exchange after next.
__device__ __forceinline__ Entries exchange(Shared& shared, const Product& product, int thread, int number, float& curvature) {
  const int lane = thread % 32, warp = thread / 32;
  auto& of = shared.exchanged[number % 2];
  if (lane % 4 == 0) {
    const int row = warp * 16 + lane / 4;
    of.rows[place_of_row(row)] = product.rows.x, of.rows[place_of_row(row + 8)] = product.rows.y;
    if (lane == 0) of.curvatures[warp] = product.curvature;
  }
  meet();
  const float4* curvatures = reinterpret_cast<const float4*>(of.curvatures);
  const float4 a = curvatures[0], b = curvatures[1];
  curvature = ((a.x + b.x) + (a.y + b.y)) + ((a.z + b.z) + (a.w + b.w));
  return reinterpret_cast<const Entries*>(of.rows)[lane];
}
