#pragma once
// Values that the compiler cannot see through: what it would otherwise derive from them early and keep over a loop costs
// registers that are not there.

// The thread's and the block's number, read anew at every call.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}

__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}

__device__ __forceinline__ void make_opaque(unsigned& x) { asm volatile("" : "+r"(x)); }

template <class T>
__device__ __forceinline__ void make_opaque(T*& x) {
  asm volatile("" : "+l"(x));
}

__device__ __forceinline__ float copy_opaque(float x) {
  float y;
  asm volatile("mov.b32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
