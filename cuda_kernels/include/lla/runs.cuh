#pragma once
// A warp's run of 64 channels of a tile, which becomes X in registers: as the tensor cores take its transpose, 16 channels by 16 keys
// at a time. Of each a lane has channels g and g + 8 (g = lane / 4), and of both keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
// (t = lane % 4), two keys in a register. So a lane needs the origins of 8 channels, and the roots of a quarter of the keys.

#include "lla/scale.cuh"
#include "lla/shape.cuh"
#include "ptx/mma.cuh"

constexpr int CHANNEL_BLOCKS = 64 / 16, KEY_BLOCKS = TILE / 16;
constexpr int KEY_BLOCK = 16 * 128;  // in bytes
static_assert(GROUP_WARPS == 2 * RUNS, "each warp of a group has a run");

// Which run a warp has, by the number of a transform thread.
__device__ __forceinline__ int place_of_warp(int thread) { return thread / 32 % GROUP_WARPS; }
__device__ __forceinline__ bool is_value_run(int thread) { return place_of_warp(thread) < RUNS; }
// The first of a lane's channels, each 8 after the one before, as a column of X.
constexpr int LANE_CHANNELS = 2 * CHANNEL_BLOCKS;
__device__ __forceinline__ int first_column(int thread) { return column_of_place(place_of_warp(thread)) + thread % 32 / 4; }

// What is subtracted from a lane's channels, scaled as they are, each twice.
struct RunOrigin {
  unsigned of[LANE_CHANNELS] = {};

  __device__ __forceinline__ void read(const float* origin_of_columns, float scale, int thread) {
    const float* from = origin_of_columns + first_column(thread);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
      const float x = scale * from[8 * i];
      of[i] = narrow_pair<false>(x, x);
    }
  }
};

// Whether X is multiplied by the roots for its sums on the tensor cores, where all columns of the product are the same. With heads of
// 128 these have more to do, and many rows took 4 % longer so; but not those in turn, whose early tiles have them to themselves (on an H200).
constexpr bool SUMS_ARE_PRODUCTS = D == 64 || IN_TURN;

// Sums over keys of X times the roots, of a lane's channels: of each the sum, twice, or, unless they are products, what the lane has
// of it.
class RunSums {
  float of[CHANNEL_BLOCKS][4] = {};

 public:
  // x: a block of X. roots: of the lane's keys.
  __device__ __forceinline__ void add(int block, const unsigned (&x)[4], const unsigned (&roots)[2]) {
    float(&sums)[4] = of[block];
    if constexpr (SUMS_ARE_PRODUCTS) {
      multiply_add<false>(sums[0], sums[1], sums[2], sums[3], x, roots[0], roots[1]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 root = widen_pair<false>(roots[e / 2]), weighted = widen_pair<false>(x[e]);
        sums[e % 2 * 2] += root.x * weighted.x, sums[e % 2 * 2] += root.y * weighted.y;
      }
    }
  }

  // To lie in shared memory.
  __device__ __forceinline__ void store(float* to_columns, int thread) const {
    float* to = to_columns + first_column(thread);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
      float sum = of[i / 2][i % 2 * 2];
      if constexpr (!SUMS_ARE_PRODUCTS) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
      }
      if (thread % 4 == 0) to[8 * i] = sum;
    }
  }

  // To another origin and maximum. weight: of all keys.
  __device__ __forceinline__ void move(const float* shift_of_columns, float weight, float rescale, int thread) {
    const float* shift = shift_of_columns + first_column(thread);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++) {
      float& sum = of[i / 2][i % 2 * 2];
      // Of parts the first lane's.
      const float moved = SUMS_ARE_PRODUCTS || thread % 4 == 0 ? weight * shift[8 * i] : 0.0f;
      sum = rescale * (sum - moved), of[i / 2][i % 2 * 2 + 1] = sum;
    }
  }
};

// Rows that no one sees may hold anything, and a weight of 0 times NaN is NaN. first, end: of those that are seen, in the tile.
__device__ __forceinline__ void hide_keys(unsigned run, int first, int end, int lane) {
  // Lanes may have loaded what others write.
  __syncwarp();
#pragma unroll 1
  for (int key = lane / 8; key < TILE; key += 4)
    if (key < first || key >= end) shared_store4(run + key * 128 + lane % 8 * 16, {0, 0, 0, 0});
  __syncwarp();
}

// Blocks of a run as they came: what is loaded at once, of the same keys, and then what is loaded while that becomes X. Where rows are
// taken in turn all of a step's are loaded at once, and none ahead: they took 4 % longer otherwise (on an H200).
class RawBlocks {
  static constexpr int AHEAD = IN_TURN ? 0 : 1;
  static constexpr int AT_ONCE = AHEAD ? 2 : CHANNEL_BLOCKS, PARTS = CHANNEL_BLOCKS / AT_ONCE;
  unsigned row, of[1 + AHEAD][AT_ONCE][4];

  __device__ __forceinline__ unsigned place(int step, int c) const { return (row + step * KEY_BLOCK) ^ c << 5; }

  __device__ __forceinline__ void load(int number) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) load_matrices_transposed(of[number % (1 + AHEAD)][i], place(number / PARTS, number % PARTS * AT_ONCE + i));
  }

  // A block becomes X where it lies.
  template <bool SCALED>
  __device__ __forceinline__ void put(unsigned (&x)[4], int step, int c, unsigned scales, const unsigned (&of_keys)[2], const RunOrigin& origin, RunSums& sums) const {
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = x_of_pair<SCALED>(x[e], scales, origin.of[2 * c + e % 2], of_keys[e / 2]);
    store_matrices_transposed(place(step, c), x);
    sums.add(c, x, of_keys);
  }

 public:
  // A lane has, in each 8 x 8 numbers, a row that it reads or writes: of keys 0 to 7 and 8 to 15, the first and the next 8 channels.
  __device__ __forceinline__ RawBlocks(unsigned run, int lane) : row(run + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2 ^ lane % 8) << 4)) {}

  __device__ __forceinline__ void load_first() {
    if constexpr (AHEAD) load(0);
  }

  // The run becomes X, and adds to the sums. roots: of the key of twice the lane's number, and of the next.
  __device__ __forceinline__ void transform(unsigned roots, const RunOrigin& origin, RunSums& sums, int lane) {
    unsigned of_keys[2];
#pragma unroll
    for (int number = 0; number < KEY_BLOCKS * PARTS; number++) {
      const int step = number / PARTS;
#pragma unroll
      for (int h = 0; h < 2 && number % PARTS == 0; h++) of_keys[h] = __shfl_sync(~0u, roots, 8 * step + 4 * h + lane % 4);
      // Before the stores: the compiler may not move a load across a store.
      if (const int next = number + AHEAD; next < KEY_BLOCKS * PARTS) load(next);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) put<false>(of[number % (1 + AHEAD)][i], step, number % PARTS * AT_ONCE + i, 0, of_keys, origin, sums);
    }
  }

  // The same where the scale is not 1, which is rare. What was loaded before is loaded again.
  __device__ __forceinline__ void scale_and_transform(unsigned roots, float scale, const RunOrigin& origin, RunSums& sums, int lane) const {
    const unsigned scales = narrow_pair<BFLOAT>(scale, scale);
#pragma unroll 1
    for (int step = 0; step < KEY_BLOCKS; step++) {
      unsigned of_keys[2];
#pragma unroll
      for (int h = 0; h < 2; h++) of_keys[h] = __shfl_sync(~0u, roots, 8 * step + 4 * h + lane % 4);
#pragma unroll
      for (int c = 0; c < CHANNEL_BLOCKS; c++) {
        unsigned x[4];
        load_matrices_transposed(x, place(step, c));
        put<true>(x, step, c, scales, of_keys, origin, sums);
      }
    }
  }
};
