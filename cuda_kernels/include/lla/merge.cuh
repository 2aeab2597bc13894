#pragma once
// Merging the moments of the blocks that share a row: through distributed shared memory within a cluster, through
// global memory between clusters, of which the last to finish adds up all. Either way every block of a cluster adds
// up its own slice.
//
// Moments about their own means add up to those of all keys with (their mean - that of all) times its transpose, by
// their weight: so parts differ by a vector each.

#include "lla/shape.cuh"
#include "ptx/atomics.cuh"
#include "ptx/cluster.cuh"

constexpr int SLICE_ROWS = D / CLUSTER;
constexpr int QUADS = 2 * D / 4;
constexpr int SLICE_QUADS = SLICE_ROWS * QUADS;
// Loads of a thread at once: what is far away is waited for, not moved.
constexpr int MERGED_AT_ONCE = SLICE_QUADS / THREADS < 4 ? SLICE_QUADS / THREADS : 4;
static_assert(SLICE_QUADS % (MERGED_AT_ONCE * THREADS) == 0 && THREADS % QUADS == 0);

// By all threads of the cluster, or of a block that is its own.
__device__ __forceinline__ void cluster_sync(BlockMeeting& meet_block) {
  if constexpr (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    meet_block();
  }
}

// Quad e of the slice of block `rank`.
__device__ __forceinline__ float* moments_at(Shared& shared, int rank, int e) {
  return &shared.moments[rank * SLICE_ROWS + e / QUADS][e % QUADS * 4];
}

// The sums of `count` parts to shared.total; in the parts, the root of the weight times the distance from the common
// mean takes the place of the mean. Every thread returns the common maximum.
__device__ __forceinline__ float merge_sums(Shared& shared, BlockMeeting& meet_block, int count, int thread) {
  meet_block();
  float m = minus_infinity();
  for (int c = 0; c < count; c++) m = fmaxf(m, shared.parts[c].m);
  float d1 = 0.0f;
  for (int c = 0; c < count; c++) d1 += rescaling(shared.parts[c].m, m) * shared.parts[c].d1;
  if (thread < 2 * D) {
    float sum = 0.0f;
    for (int c = 0; c < count; c++)
      sum += rescaling(shared.parts[c].m, m) * shared.parts[c].d1 * shared.parts[c].mean[thread];
    const float mean = sum / d1;
    for (int c = 0; c < count; c++) {
      const float weight = rescaling(shared.parts[c].m, m) * shared.parts[c].d1;
      shared.parts[c].mean[thread] = sqrtf(weight) * (shared.parts[c].mean[thread] - mean);
    }
    shared.total.mean[thread] = mean;
  }
  if (thread == 0) shared.total.d1 = d1, shared.total.m = m;
  meet_block();
  return m;
}

__device__ __forceinline__ void add_part(float4& sum, float4 moments, float factor, float distance, float4 distances) {
  sum.x += factor * moments.x + distance * distances.x;
  sum.y += factor * moments.y + distance * distances.y;
  sum.z += factor * moments.z + distance * distances.z;
  sum.w += factor * moments.w + distance * distances.w;
}

// Quads of the slice, of parts whose sums are in shared.parts, to `give`; load(c, e): quad e of part c.
template <int UNROLLED, class Load, class Give>
__device__ __forceinline__ void add_slices(Shared& shared, int count, int rank, float m, Load load, Give give) {
  const int thread = thread_index();
#pragma unroll 1
  for (int first = thread; first < SLICE_QUADS; first += MERGED_AT_ONCE * THREADS) {
    float4 sums[MERGED_AT_ONCE] = {};
#pragma unroll UNROLLED
    for (int c = 0; c < count; c++) {
      float4 part[MERGED_AT_ONCE];
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; i++) part[i] = load(c, first + i * THREADS);
      const float factor = rescaling(shared.parts[c].m, m);
      const float4 distances = reinterpret_cast<const float4*>(shared.parts[c].mean)[thread % QUADS];
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; i++) {
        const int row = rank * SLICE_ROWS + (first + i * THREADS) / QUADS;
        add_part(sums[i], part[i], factor, shared.parts[c].mean[row], distances);
      }
    }
#pragma unroll
    for (int i = 0; i < MERGED_AT_ONCE; i++) give(first + i * THREADS, sums[i]);
  }
}

// Adds up this row's parts, one slice of the moments a block of the cluster, into the moments of the cluster's first
// block, of the whole row and with the ridge; true there once they are.
__device__ __forceinline__ bool merge(Shared& shared, BlockMeeting& meet_block, const lla::Call& call, const lla::RowIndex& row,
                                      int item, int clusters) {
  const int thread = thread_index();
  const int rank = CLUSTER == 1 ? 0 : cluster_rank();
  // To the first block, in place of what only this one reads there.
  const auto give_whole = [&](int e, float4 sum) {
    const float inverse_d1 = 1.0f / shared.total.d1;
    sum.x *= inverse_d1, sum.y *= inverse_d1, sum.z *= inverse_d1, sum.w *= inverse_d1;
    const int r = rank * SLICE_ROWS + e / QUADS, column = e % QUADS * 4;
    if (r / 4 * 4 == column) {
      const float ridge = row.ridge(call);
      sum.x += r == column ? ridge : 0.0f, sum.y += r == column + 1 ? ridge : 0.0f;
      sum.z += r == column + 2 ? ridge : 0.0f, sum.w += r == column + 3 ? ridge : 0.0f;
    }
    const unsigned at = shared_address(moments_at(shared, rank, e));
    cluster_store4(CLUSTER > 1 ? cluster_address(at, 0) : at, sum);
  };
  float* parts = call.partials + static_cast<long long>(item) * (call.splits / CLUSTER) * PARTIAL_FLOATS;
  float* mine = parts + static_cast<long long>(block_index() % call.splits / CLUSTER) * PARTIAL_FLOATS;
  const auto give_part = [&](int e, float4 sum) { reinterpret_cast<float4*>(mine)[rank * SLICE_QUADS + e] = sum; };
  if constexpr (CLUSTER > 1) {
    cluster_arrive_shared();
    cluster_wait();
    for (int e = thread; e < CLUSTER * SUMS_FLOATS / 4; e += THREADS) {
      const unsigned at = shared_address(reinterpret_cast<float4*>(&shared.own) + e % (SUMS_FLOATS / 4));
      reinterpret_cast<float4*>(shared.parts)[e] = cluster_load4(cluster_address(at, e / (SUMS_FLOATS / 4)));
    }
    const float m = merge_sums(shared, meet_block, CLUSTER, thread);
    const auto load = [&](int c, int e) {
      return cluster_load4(cluster_address(shared_address(moments_at(shared, rank, e)), c));
    };
    if (clusters == 1) {
      add_slices<CLUSTER>(shared, CLUSTER, rank, m, load, give_whole);
      // No block leaves before the others have read what it has.
      cluster_sync(meet_block);
      return rank == 0;
    }
    add_slices<CLUSTER>(shared, CLUSTER, rank, m, load, give_part);
  } else {
    for (int e = thread; e < SLICE_QUADS; e += THREADS)
      give_part(e, *reinterpret_cast<const float4*>(moments_at(shared, rank, e)));
  }
  const Sums& sums = CLUSTER > 1 ? shared.total : shared.own;
  if (rank == 0 && thread < SUMS_FLOATS / 4)
    reinterpret_cast<float4*>(mine + 2 * D * D)[thread] = reinterpret_cast<const float4*>(&sums)[thread];
  meet_block();
  if constexpr (CLUSTER > 1) {
    // Of what all threads wrote.
    if (thread == 0) fence_device();
    cluster_arrive_relaxed();
    cluster_wait();
  }
  if (rank == 0 && thread == 0) {
    const bool last = count_one(call.counters + item) == unsigned(clusters - 1);
    if (last) call.counters[item] = 0;
    shared.is_last = last;
  }
  cluster_sync(meet_block);
  const unsigned last =
      CLUSTER > 1 ? cluster_load(cluster_address(shared_address(&shared.is_last), 0)) : shared.is_last;
  if (last) {
    for (int e = thread; e < clusters * (SUMS_FLOATS / 4); e += THREADS)
      reinterpret_cast<float4*>(shared.parts)[e] = __ldcg(
          reinterpret_cast<const float4*>(parts + e / (SUMS_FLOATS / 4) * PARTIAL_FLOATS + 2 * D * D) +
          e % (SUMS_FLOATS / 4));
    const float m = merge_sums(shared, meet_block, clusters, thread);
    const auto load = [&](int c, int e) {
      return __ldcg(reinterpret_cast<const float4*>(parts + c * PARTIAL_FLOATS) + rank * SLICE_QUADS + e);
    };
    add_slices<4>(shared, clusters, rank, m, load, give_whole);
  }
  cluster_sync(meet_block);
  return last && rank == 0;
}
