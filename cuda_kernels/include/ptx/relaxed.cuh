#pragma once
// Loads and stores that other blocks of the device see word by word, past the first-level cache.

__device__ __forceinline__ float4 relaxed_load4(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ float2 relaxed_load2(const float2* from) {
  float2 x;
  asm volatile("ld.relaxed.gpu.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void relaxed_store4(float4* to, const float4& x) {
  asm volatile("st.relaxed.gpu.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

__device__ __forceinline__ void relaxed_store2(float2* to, const float2& x) {
  asm volatile("st.relaxed.gpu.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}
