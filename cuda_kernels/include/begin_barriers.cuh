#pragma once
// Memory barriers that follow one another in shared memory.

#include "ptx/mbarrier.cuh"

// Numbers BEGIN to END of those from address `first` on, which wait for `count` arrivals each; by a lane of a warp.
template <int BEGIN, int END>
__device__ __forceinline__ void begin_barriers(unsigned first, int count, int lane) {
  if (lane > 0) return;
#pragma unroll
  for (int b = BEGIN; b < END; b++) mbarrier_init(first + b * 8, count);
  fence_mbarrier_init();
}
