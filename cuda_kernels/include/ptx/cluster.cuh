#pragma once
// Clusters of blocks (sm_90) and their distributed shared memory.

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What came before in any memory is visible to the cluster's other blocks after their wait. That takes 700 clocks and more,
// as long as what was written last is under way to global memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// Of nothing: what others have left has been read.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// What came before in this block's own shared memory comes before what it tells the others next.
__device__ __forceinline__ void release_to_cluster() {
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
}

// As cluster_arrive, of that alone.
__device__ __forceinline__ void cluster_arrive_shared() {
  release_to_cluster();
  cluster_arrive_relaxed();
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// What others sent has been found: what they released before it comes before all that is sent to them from now on.
__device__ __forceinline__ void acquire_from_cluster() {
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// A word that another block looks for: whole, and ordering nothing else. Compute-sanitizer's racecheck takes no access but an
// atomic operation for one that may meet another.
__device__ __forceinline__ void cluster_store_relaxed(unsigned address, unsigned long long x) {
#ifdef FOR_RACECHECK
  unsigned long long before;
  asm volatile("atom.relaxed.cluster.shared::cluster.exch.b64 %0, [%1], %2;" : "=l"(before) : "r"(address), "l"(x) : "memory");
#else
  asm volatile("st.relaxed.cluster.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
#endif
}

__device__ __forceinline__ unsigned long long shared_load_relaxed(unsigned address) {
  unsigned long long x;
#ifdef FOR_RACECHECK
  asm volatile("atom.relaxed.cluster.shared::cta.or.b64 %0, [%1], 0;" : "=l"(x) : "r"(address) : "memory");
#else
  asm volatile("ld.relaxed.cluster.shared::cta.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
#endif
  return x;
}

// The address in block `rank` that corresponds to `address` in this one.
__device__ __forceinline__ unsigned cluster_address(unsigned address, unsigned rank) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ float4 cluster_load4(unsigned address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
  return x;
}

__device__ __forceinline__ float2 cluster_load2(unsigned address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
  return x;
}

__device__ __forceinline__ unsigned cluster_load(unsigned address) {
  unsigned x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void cluster_store4(unsigned address, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
