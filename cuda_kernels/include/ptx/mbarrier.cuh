#pragma once
// Barriers in shared memory that count arrivals, and from compute capability 9.0 on the bytes of asynchronous copies.

__device__ __forceinline__ void mbarrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same; returns how many arrivals the barrier waited for before.
__device__ __forceinline__ unsigned mbarrier_arrive_counted(unsigned barrier) {
  unsigned before;
  asm volatile(
      "{\n\t"
      ".reg .b64 state;\n\t"
      "mbarrier.arrive.shared::cta.b64 state, [%1];\n\t"
      "mbarrier.pending_count.b64 %0, state;\n\t"
      "}"
      : "=r"(before)
      : "r"(barrier)
      : "memory");
  return before;
}

// Before its memory serves anything else, a barrier on which nobody waits any more must end.
__device__ __forceinline__ void mbarrier_invalidate(unsigned barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Before 9.0 none waits but by asking again.
#if __CUDA_ARCH__ < 900
#define MBARRIER_TRY "mbarrier.test_wait.parity"
#else
#define MBARRIER_TRY "mbarrier.try_wait.parity"
#endif

__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "wait:\n\t" MBARRIER_TRY ".shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra wait;\n\t"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
