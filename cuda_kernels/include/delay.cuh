#pragma once
// Waits of random length where copies, and what warps give each other, are waited for, to shake out races; compiled in
// by STRESS alone.

__device__ __forceinline__ void delay() {
#ifdef STRESS
  unsigned x = clock() * 2654435761u ^ threadIdx.x / 32 * 40503u;
  if ((x >> 28) < 4) __nanosleep(x >> 20 & 1023);
#endif
}
