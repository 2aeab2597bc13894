// Copies of 16 bytes from global to shared memory that run beside the thread.
#pragma once

namespace ptx {

// Zeros where `present` is false; `from` is not read then.
__device__ __forceinline__ void copy_16_bytes(unsigned to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but this thread's last `pending` groups are complete.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace ptx
