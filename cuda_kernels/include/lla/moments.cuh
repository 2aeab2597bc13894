#pragma once
// The matrix warps: copies of the keys and their scores, and the moments X_k^T [X_k X_v] in their registers.

#include "lanes.cuh"
#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"
#include "shape.cuh"

// Row and column of accumulator 4 j are those of a 16 x 8 product: `upper`, 8 j + 2 (thread % 4).
__device__ __forceinline__ int upper_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

// Moments about the origin before its last shift become moments about the new one.
__device__ __forceinline__ void move_moments(const Shared& shared, float (&c)[D], float rescale) {
  const int upper = upper_row();
  const float d1 = shared.moved_d1;
  const float sum[2] = {shared.moved_sums[upper], shared.moved_sums[upper + 8]};
  const float shift[2] = {shared.shift[upper], shared.shift[upper + 8]};
#pragma unroll
  for (int e = 0; e < D; e += 4) {
    const int column = 2 * e + threadIdx.x % 4 * 2;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.moved_sums[column]);
    const float2 shifts = *reinterpret_cast<const float2*>(&shared.shift[column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      c[e + 2 * h] = rescale * (c[e + 2 * h] - sum[h] * shifts.x - shift[h] * (sums.x - d1 * shifts.x));
      c[e + 2 * h + 1] = rescale * (c[e + 2 * h + 1] - sum[h] * shifts.y - shift[h] * (sums.y - d1 * shifts.y));
    }
  }
}

// A matrix warp copies and scores the keys of the transform warp of its number, while the tensor cores work.
class Copies {
 public:
  __device__ __forceinline__ Copies(Shared& shared, const lla::Call& call, const lla::Row& row, int begin, int keys)
      : shared_(shared), cache_(call, row, Lane(threadIdx.x % 32)) {
    const Lane lane(threadIdx.x % 32);
    const int first = threadIdx.x / 32 * WARP_KEYS + 4 * lane.sub_key;
    to_ = lane.raw(shared, threadIdx.x / 32);
    key_ = begin + first;
    left_ = keys - first;
    stride_ = cache_.stride[1];
#if !PAGED
    from_ = cache_.of_key(key_);
#endif
  }

  // Issues the copies of a tile, one after the other, as one group of this thread.
  __device__ __forceinline__ void issue(int tile) {
    const unsigned to = to_ + tile % SLOTS * RAW_SLOT;
#pragma unroll
    for (int key = 0; key < LANE_KEYS; key++) {
      bool present = key_of(key) < left_;
#if PAGED
      const half_bits* from = cache_.first;
      if (present) {
        const half_bits* place = cache_.of_key(key_ + key_of(key));
        present = place != nullptr;
        if (place)
          from = place;
        else
          shared_.bad_page = 1;
      }
      copy_16_or_zeros(to + key_of(key) * RAW_PITCH, from, present);
#else
      copy_16_or_zeros(to + key_of(key) * RAW_PITCH, from_, present);
      from_ += ((key + 1 < LANE_KEYS ? key_of(key + 1) : TILE) - key_of(key)) * stride_;
#endif
    }
    copy_commit();
    key_ += TILE;
    left_ -= TILE;
  }

 private:
  Shared& shared_;
  Cache cache_;
  const half_bits* from_;
  long long stride_;
  unsigned to_;
  int key_, left_;
};

// Scores of a tile whose copies have arrived; `present`: how many of the warp's keys are.
__device__ __forceinline__ void score(Shared& shared, int tile, int present, float scale_log2) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = tile % SLOTS, stage = tile % SCORE_STAGES;
  // Lanes 0 to 3 hold row 0 of the left operand, the query; the other rows are zero.
  const uint4* query = &shared.query[0][min(lane, 4)];
  float even[WARP_KEYS / 8][4] = {}, odd[WARP_KEYS / 8][4] = {};
  const unsigned at = shared_address(shared.raw[warp][slot]) + lane % 8 * RAW_PITCH + lane / 8 * 16;
#pragma unroll
  for (int step = 0; step < D / 32; step++) {
    const uint4 low = query[2 * step * 5], high = query[(2 * step + 1) * 5];
    const unsigned a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
      unsigned k[4];
      load_matrices(k, at + eight * 8 * RAW_PITCH + step * 64);
      multiply_add<BFLOAT>(even[eight][0], even[eight][1], even[eight][2], even[eight][3], a[0], k[0], k[1]);
      multiply_add<BFLOAT>(odd[eight][0], odd[eight][1], odd[eight][2], odd[eight][3], a[1], k[2], k[3]);
    }
  }
  // Lanes 0 to 3 have the scores of keys 2 lane and 2 lane + 1 of every eight.
  float m = minus_infinity();
#pragma unroll
  for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
    const int key = eight * 8 + lane * 2;
    float2 s = {(even[eight][0] + odd[eight][0]) * scale_log2, (even[eight][1] + odd[eight][1]) * scale_log2};
    if (key >= present) s.x = minus_infinity();
    if (key + 1 >= present) s.y = minus_infinity();
    if (lane < 4) {
      *reinterpret_cast<float2*>(&shared.scores[stage][warp * WARP_KEYS + key]) = s;
      m = fmaxf(m, fmaxf(s.x, s.y));
    }
  }
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
  if (lane == 0) shared.maxima[stage][warp] = m;
  __syncwarp();
  if (lane == 0) mbarrier_arrive(shared_address(&shared.scores_full[stage]));
}

// Columns of the moments, to shared memory; c holds those of X.
template <int FIRST, int COLUMNS>
__device__ __forceinline__ void store_moments(Shared& shared, const float (&c)[D], float factor) {
  const int upper = upper_row();
#pragma unroll
  for (int e = FIRST / 2; e < (FIRST + COLUMNS) / 2; e += 4) {
    const int column = 2 * e + threadIdx.x % 4 * 2;
    *reinterpret_cast<float2*>(&shared.moments[upper][column]) = {factor * c[e], factor * c[e + 1]};
    *reinterpret_cast<float2*>(&shared.moments[upper + 8][column]) = {factor * c[e + 2], factor * c[e + 3]};
  }
}

// One pass over the tiles: a warpgroup accumulates the moments of its 64 key channels with the first KEY_COLUMNS, up to
// its own (the rest is symmetric), and with all value channels.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate(Shared& shared, const lla::Call& call, const lla::Row& row, float (&c)[D],
                                           int begin, int keys, int tiles) {
  const float scale_log2 = call.scale * 1.4426950408889634f;
  const int present = keys - threadIdx.x / 32 * WARP_KEYS;
#pragma unroll
  for (int e = 0; e < D; e++) c[e] = 0.0f;
  const unsigned long long x = keys_outermost(shared_address(shared.x), X_BLOCK);
  const unsigned long long left = x + threadIdx.x / 128 * descriptor_step(X_BLOCK);
  Copies copies(shared, call, row, begin, keys);
  for (int tile = 0; tile < SLOTS; tile++) copies.issue(tile);
  static_assert(SCORES_AHEAD == 2);
  copy_wait<SLOTS - 1>();
  __syncwarp();
  score(shared, 0, present, scale_log2);
  copy_wait<SLOTS - 2>();
  __syncwarp();
  if (tiles > 1) score(shared, 1, present - TILE, scale_log2);
  for (int tile = 0; tile < tiles; tile++) {
    const int stage = tile % X_STAGES;
    mbarrier_wait(shared_address(&shared.x_full[stage]), tile / X_STAGES & 1);
    const float rescale = shared.rescale[stage];
    if (rescale != 1.0f) move_moments(shared, c, rescale);
    wgmma_fence();
    const unsigned long long keys_at = x + descriptor_step(stage * X_STAGE);
    const unsigned long long left_at = left + descriptor_step(stage * X_STAGE);
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      const unsigned at = descriptor_step(step * 16 * 128);
      // All columns of 128 channels in one instruction do not compile: its accumulators and operands must fit the
      // registers a thread has before setmaxnreg.
      if constexpr (D == 128 && KEY_COLUMNS == 64)
        wgmma_m64n64(c, left_at + at, keys_at + at);
      else
        wgmma_m64n128(c, left_at + at, keys_at + at);
      if constexpr (D == 128) wgmma_m64n128(c + D / 2, left_at + at, keys_at + at + descriptor_step(2 * X_BLOCK));
    }
    wgmma_commit();
    // The tile's keys have all been read.
    copies.issue(tile + SLOTS);
    copy_wait<SLOTS - SCORES_AHEAD>();
    __syncwarp();
    if (tile + SCORES_AHEAD < tiles) score(shared, tile + SCORES_AHEAD, present - (tile + SCORES_AHEAD) * TILE, scale_log2);
    // The products of the other warpgroup (D = 128) or block (D = 64) fill the pause until the next tile.
    wgmma_wait_all();
    if (threadIdx.x % 128 == 0) mbarrier_arrive(shared_address(&shared.x_empty[stage]));
  }
  copy_wait<0>();
}
