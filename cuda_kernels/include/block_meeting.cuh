#pragma once
// The block's barrier. Racecheck, a tool of compute-sanitizer, loses sight of it after barriers of other kinds; where a kernel is
// compiled FOR_RACECHECK it is given one of those beside it.

#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"

struct BlockMeeting {
#ifdef FOR_RACECHECK
  unsigned barrier, parity = 0;

  // By all threads, once. in_shared: a word of shared memory.
  __device__ __forceinline__ BlockMeeting(const unsigned long long& in_shared, int threads) : barrier(shared_address(&in_shared)) {
    if (threadIdx.x == 0) mbarrier_init(barrier, threads);
    __syncthreads();
  }
  __device__ __forceinline__ void operator()() {
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, parity), parity ^= 1;
    __syncthreads();
  }
  __device__ __forceinline__ bool any(bool x) {
    (*this)();
    return __syncthreads_or(x);
  }
#else
  __device__ __forceinline__ BlockMeeting(const unsigned long long&, int) {}
  __device__ __forceinline__ void operator()() { __syncthreads(); }
  // The same; whether x is true in any thread.
  __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x); }
#endif
};
