#pragma once
// The products of a step of a warpgroup in half precision, by wgmma (sm_90a).
//
// As in HalfTile, S^T = K Q^T and O^T = V^T P^T, and a query and its probe, or P1 and P2, are columns side by side. The 64 keys of
// the step are rows of one product: lane (g, t) of warp w holds both scores of query t for the keys 16 w + g and 16 w + g + 8, and
// sums of its channels 16 w + g and 16 w + g + 8 of every 64. Nothing that is multiplied passes through registers but the
// weights, on their way to shared memory.

#include "ptx/barrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/wgmma.cuh"
#include "shape.cuh"

static_assert(TILES % 2 == 0, "weights are stored two groups of rows at a time");

struct WarpgroupTile {
  static constexpr int PARTS = PROBE == 2 ? 2 : 1;  // a float32 probe, and what it is more than its rounding
  static constexpr int RUNS = HEAD_DIM / 64, BLOCKS_OF_VALUES = VALUE_DIM / 64, RUN_BYTES = STEP * 128;
  unsigned queries, weights;  // addresses of the operands
  int turn;                   // of the two places for weights

  __device__ static int warp() { return threadIdx.x / 32 % 4; }
  // The first key of a lane, of the step's.
  __device__ static int key(int lane) { return warp() * 16 + lane / 4; }
  __device__ static int channel(int i, int g) { return i / 2 * 64 + warp() * 16 + i % 2 * 8 + g; }
  // The hardware barrier of the warpgroup.
  __device__ static int barrier() { return 1 + threadIdx.x / 128; }

  __device__ void load(const Element* from, int) {
    extern __shared__ __align__(1024) char shared[];
    queries = shared_address(from), weights = shared_address(shared) + WEIGHTS_AT + threadIdx.x / 128 * WEIGHTS_BYTES, turn = 0;
  }

  // On its way until `arrive`, as all products are.
  __device__ void scores(const char* keys, float (&c)[HEADS][TILES][4]) const {
    const unsigned slot = shared_address(keys);
    wgmma_fence();
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float* to[4 * TILES];
#pragma unroll
      for (int i = 0; i < 4 * TILES; i++) to[i] = &c[h][i / 4][i % 4];
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; d++) {
          const int run = h * RUNS + d / 4, at = d % 4 * 32;
          wgmma_small<8 * TILES, BFLOAT, false>(to, channels_innermost(slot + run * RUN_BYTES) + descriptor_step(at),
                                                channels_innermost(queries + part * QUERY_PART + run * OPERAND_BYTES) + descriptor_step(at),
                                                part > 0 || d > 0);
        }
    }
    wgmma_commit();
  }

  // P1, P2 of the lane's two keys become its part of the operand; the warpgroup has to meet before it multiplies.
  __device__ void put(const float (&w)[HEADS][TILES][4], int lane) const {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n += 2) {
        unsigned pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = narrow_pair<BFLOAT>(w[h][n + i / 2][i % 2 * 2], w[h][n + i / 2][i % 2 * 2 + 1]);
        const int line = (n + lane / 16) * 8 + lane % 8, piece = 2 * warp() + lane / 8 % 2;
        store_matrices_transposed(operand(h) + line * 128 + ((piece ^ line % 8) * 16), pairs);
      }
  }

  // O1 += P1 V and O2 += P2 V.
  __device__ void accumulate(const char* values, float (&O1)[HEADS][TILES][CHANNELS], float (&O2)[HEADS][TILES][CHANNELS]) {
    const unsigned slot = shared_address(values);
    wgmma_fence();
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int b = 0; b < BLOCKS_OF_VALUES; b++) {
        float* to[4 * TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            to[4 * n + 2 * half] = &O1[h][n][2 * b + half], to[4 * n + 2 * half + 1] = &O2[h][n][2 * b + half];
#pragma unroll
        for (int k = 0; k < STEP / 16; k++)
          wgmma_small<8 * TILES, BFLOAT, true>(to, keys_outermost(slot + (h * BLOCKS_OF_VALUES + b) * RUN_BYTES, RUN_BYTES) + descriptor_step(k * 2048),
                                               channels_innermost(operand(h)) + descriptor_step(k * 32), true);
      }
    wgmma_commit();
    turn ^= 1;
  }

  __device__ static void arrive(float (&c)[HEADS][TILES][4], float (&O1)[HEADS][TILES][CHANNELS], float (&O2)[HEADS][TILES][CHANNELS]) {
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) wgmma_arrived(c[h][n][e]);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) wgmma_arrived(O1[h][n][i]), wgmma_arrived(O2[h][n][i]);
      }
  }

 private:
  __device__ unsigned operand(int h) const { return weights + (turn * HEADS + h) * OPERAND_BYTES; }
};
