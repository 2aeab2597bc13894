#pragma once
// Hardware barriers of a block by number, for some of its warps; 0 is __syncthreads.

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; whether any of the threads gave true.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool x) {
  int any;
  asm volatile(
      "{\n\t"
      ".reg .pred x, any;\n\t"
      "setp.ne.b32 x, %3, 0;\n\t"
      "barrier.red.or.pred any, %1, %2, x;\n\t"
      "selp.b32 %0, 1, 0, any;\n\t"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(int(x))
      : "memory");
  return any;
}
