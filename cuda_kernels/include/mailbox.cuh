#pragma once
// Numbers that a block posts for another one, word by word: a word of all ones is one that is not there yet, so that
// whoever waits for a number sees it as soon as it is in memory, without a fence or a counter before it. Reader and
// writer agree on what is posted; the reader sets every word back to ones.
//
// A block may wait for blocks of lower numbers alone: those are running or done when it begins, whatever else the
// device is busy with.

#include "ptx/numbers.cuh"
#include "ptx/relaxed.cuh"

constexpr unsigned NOT_POSTED = 0xffffffffu;

__device__ __forceinline__ bool is_posted(float x) { return __float_as_uint(x) != NOT_POSTED; }
__device__ __forceinline__ bool is_posted(const float2& x) { return is_posted(x.x) && is_posted(x.y); }
__device__ __forceinline__ bool is_posted(const float4& x) { return is_posted(x.x) && is_posted(x.y) && is_posted(x.z) && is_posted(x.w); }

// All ones are a NaN, which any other NaN stands for.
__device__ __forceinline__ float postable(float x) { return is_posted(x) ? x : quiet_nan(); }

__device__ __forceinline__ void post(float4* to, const float4& x) {
  relaxed_store4(to, make_float4(postable(x.x), postable(x.y), postable(x.z), postable(x.w)));
}
__device__ __forceinline__ void post(float2* to, const float2& x) { relaxed_store2(to, make_float2(postable(x.x), postable(x.y))); }

__device__ __forceinline__ float4 look(const float4* from) { return relaxed_load4(from); }
__device__ __forceinline__ float2 look(const float2* from) { return relaxed_load2(from); }

// Looks again until it is there. x: what the first look saw.
template <class T>
__device__ __forceinline__ void await(T& x, const T* from) {
  while (!is_posted(x)) x = look(from);
}

// By the whole block, which has read them all.
__device__ __forceinline__ void set_back(float* words, int count) {
  const float ones = __uint_as_float(NOT_POSTED);
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x) reinterpret_cast<float4*>(words)[i] = make_float4(ones, ones, ones, ones);
}
