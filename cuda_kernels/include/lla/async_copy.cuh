// Copies of 16 bytes from global to shared memory that run beside the thread.
#pragma once

namespace ptx {

// Zeros where `present` is false; `from` is not read then.
__device__ __forceinline__ void copy_16_bytes(unsigned to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}

// One arrival of this thread, once its copies so far are complete; the barrier must count it.
__device__ __forceinline__ void arrive_after_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace ptx
