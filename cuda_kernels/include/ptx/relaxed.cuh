#pragma once
// Words that blocks of a device exchange while they run: each is whole, and orders nothing else.

__device__ __forceinline__ void store_relaxed(unsigned long long* word, unsigned long long x) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(x) : "memory");
}

__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* word) {
  unsigned long long x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(word) : "memory");
  return x;
}

__device__ __forceinline__ void add_relaxed(unsigned long long* word, unsigned long long x) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(word), "l"(x) : "memory");
}

// Two words of 8 bytes that are one.
struct alignas(16) Word16 {
  unsigned long long first, second;
};

__device__ __forceinline__ void store_relaxed(Word16* word, Word16 x) {
  asm volatile("{ .reg .b128 x; mov.b128 x, {%1, %2}; st.relaxed.gpu.global.b128 [%0], x; }" ::"l"(word), "l"(x.first), "l"(x.second) : "memory");
}

__device__ __forceinline__ Word16 load_relaxed(const Word16* word) {
  Word16 x;
  asm volatile("{ .reg .b128 x; ld.relaxed.gpu.global.b128 x, [%2]; mov.b128 {%0, %1}, x; }" : "=l"(x.first), "=l"(x.second) : "l"(word) : "memory");
  return x;
}
