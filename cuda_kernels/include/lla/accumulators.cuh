#pragma once
// How a matrix product lies over a warpgroup's registers.

// Row and column of accumulator 4 j are those of a 16 x 8 product: `upper`, 8 j + 2 (thread % 4).
__device__ __forceinline__ int upper_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Sums over keys of products of X become the moments about the keys' mean, divided by their weight, in place: columns FIRST to LAST of
// them, of the lane's rows in each of BLOCKS blocks of 64. sums: of the keys about their origin, which X is scaled from.
template <int FIRST, int LAST, int BLOCKS>
__device__ __forceinline__ void centre_moments(float* const (&moments)[BLOCKS], const float* sums, float inverse_d1, float inverse_scale, int thread) {
  const int upper = upper_row(thread), column = thread % 4 * 2;
  const float factor = inverse_d1 * inverse_scale * inverse_scale;
  float means[BLOCKS][2];
#pragma unroll
  for (int b = 0; b < BLOCKS; b++)
#pragma unroll
    for (int h = 0; h < 2; h++) means[b][h] = inverse_d1 * inverse_d1 * sums[64 * b + upper + 8 * h];
#pragma unroll
  for (int j = FIRST / 8; j < LAST / 8; j++) {
    const float2 of_columns = *reinterpret_cast<const float2*>(&sums[8 * j + column]);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float* pair = moments[b] + 4 * j + 2 * h;
        pair[0] = factor * pair[0] - means[b][h] * of_columns.x;
        pair[1] = factor * pair[1] - means[b][h] * of_columns.y;
      }
    // Or all columns' sums would be loaded at once, for which there may not be the registers.
    if (j % 4 == 3) __syncwarp();
  }
}
