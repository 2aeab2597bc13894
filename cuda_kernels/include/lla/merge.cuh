#pragma once
// Merging the moments of the blocks that share a row: through distributed shared memory within a cluster, through
// global memory between clusters, of which the last to finish adds up all. Either way every block of a cluster adds
// up its own slice.

#include "ptx/cluster.cuh"
#include "lla/shape.cuh"

constexpr int SLICE_ROWS = D / CLUSTER;
constexpr int QUADS = 2 * D / 4;
// Loads of a thread at once: what is far away is waited for, not moved.
constexpr int MERGED_AT_ONCE = 4;
static_assert(SLICE_ROWS * QUADS % (MERGED_AT_ONCE * THREADS) == 0);

// By all threads of the cluster, or of a block that is its own.
__device__ __forceinline__ void cluster_sync() {
  if constexpr (CLUSTER > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

// Quad e of the slice of block `rank`.
__device__ __forceinline__ float* moments_at(Shared& shared, int rank, int e) {
  return &shared.moments[rank * SLICE_ROWS + e / QUADS][e % QUADS * 4];
}

// The moments of four neighbouring columns, moved to the common origin; shared.parts holds shifts for origins.
__device__ __forceinline__ void add_part(float4& sum, float4 moments, float factor, const Sums& part, int row,
                                         int quad) {
  const float s = part.x[row], shift = part.origin[row], d1 = part.d1;
  const float4 t = reinterpret_cast<const float4*>(part.x)[quad];
  const float4 shifts = reinterpret_cast<const float4*>(part.origin)[quad];
  sum.x += factor * (moments.x + s * shifts.x + shift * (t.x + d1 * shifts.x));
  sum.y += factor * (moments.y + s * shifts.y + shift * (t.y + d1 * shifts.y));
  sum.z += factor * (moments.z + s * shifts.z + shift * (t.z + d1 * shifts.z));
  sum.w += factor * (moments.w + s * shifts.w + shift * (t.w + d1 * shifts.w));
}

// Turns the origins of `count` parts into shifts from that of the part of the largest score, and gives the sums of
// all of them to shared.sums. Every thread returns the common maximum.
__device__ __forceinline__ float merge_sums(Shared& shared, int count, int thread) {
  __syncthreads();
  float m = minus_infinity();
  int largest = 0;
  for (int c = 0; c < count; c++)
    if (shared.parts[c].m > m) m = shared.parts[c].m, largest = c;
  if (thread < 2 * D) {
    const float origin = shared.parts[largest].origin[thread];
    float x = 0.0f;
    for (int c = 0; c < count; c++) {
      Sums& part = shared.parts[c];
      const float shift = part.origin[thread] - origin;
      part.origin[thread] = shift;
      x += rescaling(part.m, m) * (part.x[thread] + part.d1 * shift);
    }
    shared.sums.x[thread] = x;
    shared.sums.origin[thread] = origin;
  }
  if (thread == 0) {
    float d1 = 0.0f;
    for (int c = 0; c < count; c++) d1 += rescaling(shared.parts[c].m, m) * shared.parts[c].d1;
    shared.sums.d1 = d1;
    shared.sums.m = m;
  }
  __syncthreads();
  return m;
}

// Adds up this row's parts, one slice of the moments a block of the cluster, into the moments and sums of the
// cluster's first block; true there once they are the whole row's.
__device__ __forceinline__ bool merge(Shared& shared, const lla::Call& call, int clusters) {
  const int thread = thread_index();
  const int rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
  if constexpr (CLUSTER > 1) {
    cluster_sync();
    for (int e = thread; e < CLUSTER * SUMS_FLOATS; e += THREADS) {
      const unsigned at = shared_address(reinterpret_cast<float*>(&shared.sums) + e % SUMS_FLOATS);
      reinterpret_cast<unsigned*>(shared.parts)[e] = cluster_load(cluster_address(at, e / SUMS_FLOATS));
    }
    // All have read the blocks' sums before those are replaced by the cluster's.
    cluster_sync();
    const float m = merge_sums(shared, CLUSTER, thread);
    float factor[CLUSTER];
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) factor[c] = rescaling(shared.parts[c].m, m);
    for (int first = thread; first < SLICE_ROWS * QUADS; first += MERGED_AT_ONCE * THREADS) {
      float4 part[MERGED_AT_ONCE][CLUSTER];
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; i++) {
        const unsigned at = shared_address(moments_at(shared, rank, first + i * THREADS));
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) part[i][c] = cluster_load4(cluster_address(at, c));
      }
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; i++) {
        const int e = first + i * THREADS, r = rank * SLICE_ROWS + e / QUADS;
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) add_part(sum, part[i][c], factor[c], shared.parts[c], r, e % QUADS);
        float* at = moments_at(shared, rank, e);
        if (clusters == 1)
          cluster_store4(cluster_address(shared_address(at), 0), sum);
        else
          *reinterpret_cast<float4*>(at) = sum;
      }
    }
    // A block leaves, or replaces its slice, only when no other reads its memory any more.
    cluster_sync();
  }
  if (clusters == 1) return rank == 0;

  const int item = blockIdx.x / call.splits, cluster = blockIdx.x / CLUSTER % (call.splits / CLUSTER);
  float* parts = call.partials + static_cast<long long>(item) * (call.splits / CLUSTER) * PARTIAL_FLOATS;
  float* mine = parts + static_cast<long long>(cluster) * PARTIAL_FLOATS;
  for (int e = thread; e < SLICE_ROWS * QUADS; e += THREADS)
    reinterpret_cast<float4*>(mine)[rank * SLICE_ROWS * QUADS + e] =
        *reinterpret_cast<const float4*>(moments_at(shared, rank, e));
  if (rank == 0 && thread < SUMS_FLOATS / 4)
    reinterpret_cast<float4*>(mine + 2 * D * D)[thread] = reinterpret_cast<const float4*>(&shared.sums)[thread];
  __threadfence();
  cluster_sync();
  if (rank == 0 && thread == 0) {
    const bool last = atomicAdd(call.counters + item, 1) == clusters - 1;
    if (last) call.counters[item] = 0;
    __threadfence();
    shared.is_last = last;
  }
  cluster_sync();
  const unsigned last =
      CLUSTER > 1 ? cluster_load(cluster_address(shared_address(&shared.is_last), 0)) : shared.is_last;
  if (last) {
    __threadfence();
    for (int e = thread; e < clusters * (SUMS_FLOATS / 4); e += THREADS)
      reinterpret_cast<float4*>(shared.parts)[e] = __ldcg(
          reinterpret_cast<const float4*>(parts + e / (SUMS_FLOATS / 4) * PARTIAL_FLOATS + 2 * D * D) +
          e % (SUMS_FLOATS / 4));
    const float m = merge_sums(shared, clusters, thread);
    for (int first = thread; first < SLICE_ROWS * QUADS; first += MERGED_AT_ONCE * THREADS) {
      float4 sums[MERGED_AT_ONCE] = {};
#pragma unroll 2
      for (int c = 0; c < clusters; c++) {
        const float4* from = reinterpret_cast<const float4*>(parts + c * PARTIAL_FLOATS) + rank * SLICE_ROWS * QUADS;
        float4 part[MERGED_AT_ONCE];
#pragma unroll
        for (int i = 0; i < MERGED_AT_ONCE; i++) part[i] = __ldcg(from + first + i * THREADS);
        const float factor = rescaling(shared.parts[c].m, m);
#pragma unroll
        for (int i = 0; i < MERGED_AT_ONCE; i++) {
          const int e = first + i * THREADS;
          add_part(sums[i], part[i], factor, shared.parts[c], rank * SLICE_ROWS + e / QUADS, e % QUADS);
        }
      }
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; i++) {
        const unsigned at = shared_address(moments_at(shared, rank, first + i * THREADS));
        cluster_store4(CLUSTER > 1 ? cluster_address(at, 0) : at, sums[i]);
      }
    }
  }
  cluster_sync();
  return last && rank == 0;
}

