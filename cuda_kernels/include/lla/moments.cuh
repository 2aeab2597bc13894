#pragma once
// The matrix warps: copies of the keys and their scores, and the moments X_k^T [X_k X_v] in their registers.

#include "lla/lanes.cuh"
#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"
#include "lla/shape.cuh"

// Row and column of accumulator 4 j are those of a 16 x 8 product: `upper`, 8 j + 2 (thread % 4).
__device__ __forceinline__ int upper_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Accumulators of a warpgroup: the first KEY_COLUMNS of X_k, then all of X_v.
template <int KEY_COLUMNS>
struct Moments {
  static constexpr int KEYS = KEY_COLUMNS / 2, ALL = KEYS + D / 2;
  float c[ALL];

  // The column of X that accumulator e, a multiple of 4, has in this thread.
  __device__ __forceinline__ static int column(int e, int thread) {
    return (e < KEYS ? 2 * e : D + 2 * (e - KEYS)) + thread % 4 * 2;
  }
};

// Moments about the origin before its last shift become moments about the new one.
template <int KEY_COLUMNS>
__device__ __forceinline__ void move_moments(const Shared& shared, Moments<KEY_COLUMNS>& moments, float rescale) {
  auto& c = moments.c;
  const int thread = thread_index(), upper = upper_row(thread);
  const float d1 = shared.moved_d1;
  const float sum[2] = {shared.moved_sums[upper], shared.moved_sums[upper + 8]};
  const float shift[2] = {shared.shift[upper], shared.shift[upper + 8]};
#pragma unroll
  for (int e = 0; e < moments.ALL; e += 4) {
    const int column = moments.column(e, thread);
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
  __device__ __forceinline__ Copies(Shared& shared, const lla::Call& call, const lla::Row& row, int begin, int thread)
      : shared_(shared), lane_(thread % 32), cache_(call, row, lane_) {
    const int warp = thread / 32;
    to_ = lane_.raw(shared, warp);
    key_ = begin + warp * WARP_KEYS;
#if !PAGED
    from_ = cache_.of_key(key_ + 4 * lane_.sub_key);
    stride_bytes_ = static_cast<int>(2 * cache_.stride[1]);
#endif
  }

  // Issues the copies of a tile, one after the other, as one group of this thread.
  __device__ __forceinline__ void issue(int tile) {
    const unsigned to = to_ + tile % SLOTS * RAW_SLOT;
    const int left = this->left();
    // All look-ups of pages at once take more registers than there are.
    constexpr int AT_ONCE = PAGED ? 2 : LANE_KEYS;
#pragma unroll AT_ONCE
    for (int key = 0; key < LANE_KEYS; key++) {
      bool present = key_of(key) + 4 * lane_.sub_key < left;
#if PAGED
      const half_bits* from = cache_.first;
      if (present) {
        const half_bits* place = cache_.of_key(key_ + key_of(key) + 4 * lane_.sub_key);
        present = place != nullptr;
        if (place)
          from = place;
        else
          atomicMax(&shared_.bad_page, 1);
      }
#else
      const half_bits* from = later(key_of(key));
#endif
      copy_16_or_zeros(to + key_of(key) * RAW_PITCH, from, present);
    }
    copy_commit();
    key_ += TILE;
#if !PAGED
    from_ = later(TILE);
#endif
  }

  // How many keys the warp has left after those of the tiles issued; below 0 past the end.
  __device__ __forceinline__ int left() const { return shared_.end - key_; }

 private:
  // Or the compiler would keep all multiples of the stride over the loop.
  __device__ __forceinline__ const half_bits* later(int keys) const { return advanced(from_, stride_bytes_, keys); }

  Shared& shared_;
  Lane lane_;
  Cache cache_;
  const half_bits* from_;
  int stride_bytes_;  // the launcher sees to it that 64 keys lie within 2^31 bytes
  unsigned to_;
  int key_;
};

// Scores of a tile whose copies have arrived; `present`: how many of the warp's keys are.
__device__ __forceinline__ void score(Shared& shared, int tile, int present, float scale_log2) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int slot = tile % SLOTS, stage = tile % SCORE_STAGES;
  // Lanes 0 to 3 hold row 0 of the left operand, the query; the other rows are zero.
  const uint4* query = &shared.query[0][min(lane, 4)];
  // Two chains of products are sooner done than one, where there are registers for them.
  constexpr int CHAINS = PAGED && D == 128 ? 1 : 2;
  float sums[WARP_KEYS / 8][CHAINS][4] = {};
  const unsigned at = shared_address(shared.raw[warp][slot]) + lane % 8 * RAW_PITCH + lane / 8 * 16;
#pragma unroll
  for (int step = 0; step < D / 32; step++) {
    const uint4 low = query[2 * step * 5], high = query[(2 * step + 1) * 5];
    const unsigned a[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
      unsigned k[4];
      load_matrices(k, at + eight * 8 * RAW_PITCH + step * 64);
      auto &first = sums[eight][0], &second = sums[eight][CHAINS - 1];
      multiply_add<BFLOAT>(first[0], first[1], first[2], first[3], a[0], k[0], k[1]);
      multiply_add<BFLOAT>(second[0], second[1], second[2], second[3], a[1], k[2], k[3]);
    }
  }
  // Lanes 0 to 3 have the scores of keys 2 lane and 2 lane + 1 of every eight.
  float m = minus_infinity();
#pragma unroll
  for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
    const int key = eight * 8 + lane * 2;
    float2 s = {sums[eight][0][0], sums[eight][0][1]};
    if (CHAINS == 2) s.x += sums[eight][1][0], s.y += sums[eight][1][1];
    s.x *= scale_log2, s.y *= scale_log2;
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

// Accumulators FIRST to LAST of the moments, to shared memory.
template <int FIRST, int LAST, int KEY_COLUMNS>
__device__ __forceinline__ void store_moments(Shared& shared, const Moments<KEY_COLUMNS>& moments, float factor) {
  const int thread = thread_index(), upper = upper_row(thread);
  const auto& c = moments.c;
#pragma unroll
  for (int e = FIRST; e < LAST; e += 4) {
    const int column = moments.column(e, thread);
    *reinterpret_cast<float2*>(&shared.moments[upper][column]) = {factor * c[e], factor * c[e + 1]};
    *reinterpret_cast<float2*>(&shared.moments[upper + 8][column]) = {factor * c[e + 2], factor * c[e + 3]};
  }
}

// One pass over the tiles: a warpgroup accumulates the moments of its 64 key channels with the first KEY_COLUMNS, up
// to its own (the rest is symmetric), and with all value channels.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate(Shared& shared, const lla::Call& call, const lla::Row& row,
                                           Moments<KEY_COLUMNS>& moments, int begin, int tiles) {
  auto& c = moments.c;
  const int thread = thread_index();
  const float scale_log2 = call.scale * 1.4426950408889634f;
#pragma unroll
  for (int e = 0; e < moments.ALL; e++) c[e] = 0.0f;
  const unsigned long long x = keys_outermost(shared_address(shared.x), X_BLOCK);
  Copies copies(shared, call, row, begin, thread);
#pragma unroll 1
  for (int tile = 0; tile < SLOTS; tile++) copies.issue(tile);
  static_assert(SCORES_AHEAD == 2);
  copy_wait<SLOTS - 1>();
  __syncwarp();
  score(shared, 0, copies.left() + SLOTS * TILE, scale_log2);
  copy_wait<SLOTS - 2>();
  __syncwarp();
  if (tiles > 1) score(shared, 1, copies.left() + (SLOTS - 1) * TILE, scale_log2);
  for (int tile = 0; tile < tiles; tile++) {
    const int stage = tile % X_STAGES;
    mbarrier_wait(shared_address(&shared.x_full[stage]), tile / X_STAGES & 1);
    const float rescale = shared.rescale[stage];
    if (rescale != 1.0f) move_moments(shared, moments, rescale);
    wgmma_fence();
    const unsigned long long keys_at = x + descriptor_step(stage * X_STAGE);
    // Of this warpgroup's channels.
    const unsigned long long left_at = keys_at + descriptor_step((KEY_COLUMNS / 64 - 1) * X_BLOCK);
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      const unsigned at = descriptor_step(step * 16 * 128);
      // All columns of 128 channels in one instruction do not compile: its accumulators and operands must fit the
      // registers a thread has before setmaxnreg.
      if constexpr (D == 128 && KEY_COLUMNS == 64)
        wgmma_m64n64(c, left_at + at, keys_at + at);
      else
        wgmma_m64n128(c, left_at + at, keys_at + at);
      if constexpr (D == 128)
        wgmma_m64n128(c + moments.KEYS, left_at + at, keys_at + at + descriptor_step(2 * X_BLOCK));
    }
    wgmma_commit();
    // The tile's keys have all been read.
    copies.issue(tile + SLOTS);
    copy_wait<SLOTS - SCORES_AHEAD>();
    __syncwarp();
    if (tile + SCORES_AHEAD < tiles)
      score(shared, tile + SCORES_AHEAD, copies.left() + (SLOTS + 1 - SCORES_AHEAD) * TILE, scale_log2);
    // The products of the other warpgroup (D = 128) or block (D = 64) fill the pause until the next tile.
    wgmma_wait_all();
    if (thread % 128 == 0) mbarrier_arrive(shared_address(&shared.x_empty[stage]));
  }
  copy_wait<0>();
}
