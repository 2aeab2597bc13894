#pragma once
// Hardware barriers of a block by number, for some of its warps; 0 is __syncthreads.

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
