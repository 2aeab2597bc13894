#pragma once
// What a launch computes: the arguments of every attention kernel, and which keys a row of queries sees.

#include "shape.cuh"

// Mirrored field by field by parameters.py. Strides are in elements: batch or page, position, head.
struct Problem {
  const void *q, *r, *k, *v;
  void* out;
  const void *cu_seqlens, *cache_seqlens, *cache_leftpad, *page_table;
  float *m, *d1, *d2, *O1, *O2, *t0;
  float* partials;
  unsigned* counters;
  long long q_stride[3], r_stride[3], k_stride[3], v_stride[3], out_stride[3];
  long long cu_seqlens_stride, cache_seqlens_stride, cache_leftpad_stride, page_table_stride[2];
  int batch, q_len, kv_len, q_heads, kv_heads;
  int sequences, num_pages, window, causal;
  int cu_seqlens_wide, cache_seqlens_wide, cache_leftpad_wide, page_table_wide;
  int row_blocks, split_steps, share, surplus;
  float scale_log2;  // of scores in units of log 2
};

static_assert(sizeof(Problem) == PROBLEM_BYTES, "parameters.py describes another structure");

__device__ __forceinline__ long long index_at(const void* array, long long i, int wide) {
  return wide ? __ldg(static_cast<const long long*>(array) + i) : __ldg(static_cast<const int*>(array) + i);
}

// Positions first .. end; of a row whose lengths are invalid, `end` lies before `first`.
struct Range {
  int first, end;
  __device__ bool empty() const { return end <= first; }
  __device__ bool valid() const { return end >= first; }
  __device__ static Range invalid() { return {0, -1}; }
};

// The valid keys of a batch row before any mask.
__device__ __forceinline__ Range extent_of(const Problem& p, int batch) {
  if constexpr (!INDEXED) return {0, p.kv_len};
  long long end = p.kv_len, first = 0;
  if (p.cache_seqlens) end = index_at(p.cache_seqlens, batch * p.cache_seqlens_stride, p.cache_seqlens_wide);
  if (p.cache_leftpad) first = index_at(p.cache_leftpad, batch * p.cache_leftpad_stride, p.cache_leftpad_wide);
  if (end < 0 || end > p.kv_len || first < 0 || first > end) return Range::invalid();
  return {int(first), int(end)};
}

// The keys of a sequence's extent that its query number `query` of `q_len` sees.
__device__ __forceinline__ Range visible(const Problem& p, const Range& extent, int query, int q_len) {
  if (!p.causal || !extent.valid()) return extent;
  const int end = min(extent.end, extent.end - q_len + query + 1);
  const int first = p.window ? max(extent.first, end - p.window) : extent.first;
  return {first, max(first, end)};
}

// The keys that row `query` of batch row `batch` sees.
__device__ __forceinline__ Range keys_of_row(const Problem& p, int batch, int query) {
  if constexpr (!PACKED) return visible(p, extent_of(p, batch), query, p.q_len);
  // Queries and keys of a sequence are the positions between two offsets; the last offset that is at most `query`:
  int low = 0, high = p.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (index_at(p.cu_seqlens, middle * p.cu_seqlens_stride, p.cu_seqlens_wide) <= query)
      low = middle;
    else
      high = middle;
  }
  const long long first = index_at(p.cu_seqlens, low * p.cu_seqlens_stride, p.cu_seqlens_wide);
  const long long end = index_at(p.cu_seqlens, (low + 1) * p.cu_seqlens_stride, p.cu_seqlens_wide);
  if (first < 0 || first > query || query >= end || end > p.kv_len) return Range::invalid();
  return visible(p, {int(first), int(end)}, query - int(first), int(end - first));
}
