#pragma once
// Sizes of the tuned kernel of local linear attention, its shared memory and its barriers.

#include "lla/rows.cuh"
#include "ptx/barrier.cuh"
#include "ptx/numbers.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"

constexpr bool BFLOAT = !HALF_IS_FLOAT16;

constexpr int D = HEAD_DIM;
static_assert(D == 64 || D == 128, "one matrix warpgroup takes 64 key channels");
constexpr int MATRIX_WARPGROUPS = D / 64;
constexpr int MATRIX_THREADS = 128 * MATRIX_WARPGROUPS;
constexpr int TRANSFORM_WARPS = D == 64 ? 4 : 8;
constexpr int TRANSFORM_THREADS = 32 * TRANSFORM_WARPS;
constexpr int THREADS = MATRIX_THREADS + TRANSFORM_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCKS_PER_MULTIPROCESSOR = D == 64 ? 2 : 1;

constexpr int TILE = 64;
// A multiple of 8, the width of a score product and the period of the swizzle.
constexpr int WARP_KEYS = TILE / TRANSFORM_WARPS;
static_assert(TRANSFORM_THREADS == 2 * D, "a transform thread for every column of the sums");
static_assert(MATRIX_THREADS == TRANSFORM_THREADS, "a matrix warp scores the keys of one transform warp");
// Below this many keys a block, merging costs more than it saves.
constexpr int MIN_SPLIT_KEYS = 512;

constexpr int X_STAGES = 2;
constexpr int X_BLOCK = TILE * 128;  // bytes: 64 channels of every key of a tile
constexpr int X_STAGE = 2 * D / 64 * X_BLOCK;

constexpr int SLOTS = 4;
// 16 bytes beyond a row, or the eight rows of ldmatrix would fall on the same banks.
constexpr int RAW_PITCH = 2 * D + 16;
constexpr int RAW_SLOT = 2 * WARP_KEYS * RAW_PITCH;

// A weight may grow to 2^8 before the moments are rescaled.
constexpr float LAZY_LOG2 = 8.0f;
// Scores run two tiles ahead of the weights, so that nothing waits for the slowest warp's maximum.
constexpr int SCORES_AHEAD = 2;
constexpr int SCORE_STAGES = 4;

// In floats. Pairs of adjacent columns of 8 rows, as the tensor cores have them, fall on different banks.
constexpr int MOMENT_PITCH = 2 * D + 8;
constexpr int INVERSE_PITCH = 24;

// What a block knows of its keys beside their moments, in the order of a partial.
struct Sums {
  float x[2 * D];       // sum w (k - k0), sum w (v - v0)
  float origin[2 * D];  // k0, v0
  float d1, m, unused[2];
};
constexpr int SUMS_FLOATS = sizeof(Sums) / 4;
constexpr int PARTIAL_FLOATS = 2 * D * D + SUMS_FLOATS;
constexpr int MAX_PARTS = 16;  // that are merged at a time

struct Shared {
  union {
    struct {
      alignas(1024) unsigned char x[X_STAGES][X_STAGE];
      alignas(16) unsigned char raw[TRANSFORM_WARPS][SLOTS][RAW_SLOT];
    };
    struct {
      alignas(16) float moments[D][MOMENT_PITCH];  // [X_k^T X_k, X_k^T X_v]
      union {
        Sums parts[MAX_PARTS];
        struct {
          alignas(16) float inverse[D / 16][16][INVERSE_PITCH];  // M^T
          alignas(16) float diagonal[2][8][8];                   // of the two panels at hand
        };
      };
    };
  };
  union {
    alignas(16) float staged[TRANSFORM_WARPS][2 * D];
    float output[THREADS / D][D];
  };
  // What moves the moments to a new origin: the sums before it, and how far it is.
  alignas(16) float moved_sums[2 * D];
  alignas(16) float shift[2 * D];
  float moved_d1;
  // The query as row 0 of a score product's left operand, what lanes 0 to 3 hold; that of all others is zero.
  alignas(16) uint4 query[D / 16][5];
  alignas(16) float right_side[D];
  alignas(16) float slope[D];
  alignas(16) Sums sums;
  alignas(16) float scores[SCORE_STAGES][TILE];
  alignas(16) float maxima[SCORE_STAGES][TRANSFORM_WARPS];
  float warp_d1[TRANSFORM_WARPS];
  float rescale[X_STAGES];
  // Of keys and of values: one over what X is scaled by, a power of two, and the largest that decides it, as bits.
  float inverse_scale[2];
  unsigned largest[2];
  int end;                // of the block's keys
  unsigned out_of_range;  // X was, in this pass
  unsigned exact;         // the scale is that of the largest number of all
  unsigned is_last;
  unsigned bad_page;
  alignas(8) unsigned long long x_full[X_STAGES];
  unsigned long long x_empty[X_STAGES];
  unsigned long long scores_full[SCORE_STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lla.py asks for another size");
static_assert(sizeof(Shared) <= 227 * 1024 / BLOCKS_PER_MULTIPROCESSOR - 1024 * (BLOCKS_PER_MULTIPROCESSOR - 1));

// Hardware barriers; 0 is the block's.
enum : int { MATRIX = 1, TRANSFORM = 2, FACTORED = 3, SOLVED = 4, SUBSTITUTED = 5 };

__device__ __forceinline__ const half_bits* query_of(const lla::Call& call, const lla::RowIndex& row) {
  return static_cast<const half_bits*>(call.q) + row.batch * call.q_stride[0] + row.position * call.q_stride[1] +
         row.head * call.q_stride[2];
}

__device__ __forceinline__ half_bits* output_of(const lla::Call& call, const lla::RowIndex& row) {
  return static_cast<half_bits*>(call.out) + row.batch * call.out_stride[0] + row.position * call.out_stride[1] +
         row.head * call.out_stride[2];
}

// The factor that brings moments relative to the maximum m to the maximum `to`.
__device__ __forceinline__ float rescaling(float m, float to) {
  return to == minus_infinity() ? 1.0f : exp2_fast(m - to);
}
