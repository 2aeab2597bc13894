#pragma once
// Sizes of the kernel that takes a row's keys first and its values when the slope is known, and its shared memory.

#include "delay.cuh"
#include "lla/inputs.cuh"
#include "lla/query.cuh"
#include "lla/rows.cuh"
#include "lla/scale.cuh"
#include "lla/vectors.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/numbers.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int ROW_BLOCKS = D / 64;  // of 64 rows of the moments
constexpr int BLOCKS_PER_MULTIPROCESSOR = 2;
// All warps have moments, and a block has its row to itself.
constexpr int MATRIX_THREADS = THREADS, MATRIX_WARPS = WARPS;
constexpr bool TOGETHER = false;
constexpr int SHARERS = 1;

// A slot of the ring holds a tile of keys or of values in runs of 64 channels, in them a row of 128 bytes for every key, whose
// pieces of 16 are swapped by the key's number. X takes the place of the keys that it is made from.
constexpr int TILE = 64;
constexpr int RUNS = D / 64;
constexpr int RUN = TILE * 128, SLOT = RUNS * RUN;  // in bytes
constexpr int SLOTS = 6;
constexpr int BOXES = TILE / BOX;  // of a run
constexpr int LOAD_LANES = RUNS * BOXES;
static_assert(BOX % 8 == 0 && TILE % BOX == 0 && LOAD_LANES <= 32, "a lane brings a box");

constexpr int SCORE_STAGES = 8;
static_assert(SLOTS < SCORE_STAGES, "a chunk's scores are there at once, beside those of a tile before");

// A weight may be 2^8 times the first tile's largest.
constexpr float LAZY_LOG2 = 8.0f;

// In floats. Pairs of adjacent columns of 8 rows, as the tensor cores have them, fall on different banks.
constexpr int MOMENT_PITCH = D + 8;
constexpr int INVERSE_PITCH = 24;

// A row's keys, whose tiles are taken from one of them on, and after the last those before it.
struct Source {
  int begin, first, end;  // of the first tile, and of the keys that are seen
  int batch, kv_head, tiles, starts_at;

  // The first key of the tile that is taken as number `number`.
  __device__ __forceinline__ int position(int number) const {
    const int tile = number + starts_at;
    return begin + (tile < tiles ? tile : tile - tiles) * TILE;
  }

  // Whether the tile from a position on has keys that no one sees.
  __device__ __forceinline__ bool is_partial(int position) const { return position < first || position + TILE > end; }
  __device__ __forceinline__ bool is_seen(int key) const { return key >= first && key < end; }
};

// A vector as a column of an operand (scores.cuh).
using LyingColumn = half_bits[4][40];

struct Shared {
  union {
    alignas(1024) unsigned char ring[SLOTS][SLOT];
    // Of the factorisation: the moments, and the inverse of each diagonal block's factor.
    struct {
      alignas(16) float moments[D][MOMENT_PITCH];
      alignas(16) float inverse[D / 16][16][INVERSE_PITCH];
    };
  };
  alignas(16) half_bits query[RUNS][64];
  alignas(16) LyingColumn query_column, slope_columns[2];
  alignas(16) half_bits zeros[32];
  alignas(16) float staged[WARPS][D];
  // Of conjugate gradients: the right-hand side, what comes of two steps in turn, the vector that the moments are multiplied by, of each warp,
  // and its inner product with what comes of it.
  struct {
    alignas(16) LyingVector right, product[2];
    alignas(16) LyingVector vectors[WARPS];
    alignas(16) float curvatures[2][WARPS];
  } solving;
  alignas(16) float origin[D];
  alignas(16) float sums[D];   // of the rounded w (k - origin)
  alignas(16) float mean[D];
  alignas(16) float slope[D];
  alignas(16) float scores[SCORE_STAGES][TILE];  // of the latest tiles; in the second pass then the weights of their keys
  float warp_d1[WARPS];
  Source source;
  float m, d1;
  float inverse_scale;  // one over what X is scaled by, a power of two, and the largest key that decides it, as bits
  unsigned largest;
  unsigned growth;        // of a weight, in this pass
  unsigned out_of_range;  // X was, in this pass
  unsigned bad_page;
  alignas(8) unsigned long long full[SLOTS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lla.py asks for another size");
static_assert(sizeof(Shared) <= 227 * 1024 / BLOCKS_PER_MULTIPROCESSOR - 1024);

enum : int { MATRIX = 1 };  // the hardware barrier of all

__device__ __forceinline__ void meet() { barrier_sync(MATRIX, THREADS); }
