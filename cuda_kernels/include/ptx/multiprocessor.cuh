#pragma once
// Where a block is; what depends on it may differ from one launch to the next.

// Which of the device's multiprocessors.
__device__ __forceinline__ unsigned multiprocessor() {
  unsigned number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

// And which of its places the block of the warp has, of blocks of `warps` warps; as far as hardware has it so.
__device__ __forceinline__ unsigned place_on_multiprocessor(int warps) {
  unsigned warp;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(warp));
  return warp / warps;
}
