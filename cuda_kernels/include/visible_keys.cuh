#pragma once
// Which keys a row of queries sees. P: an argument structure with the lengths, paddings, offsets and masks of a call,
// each with a flag that tells 64-bit indices; P::indexed and P::packed are false where a kernel has none of them.

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
template <class P>
__device__ __forceinline__ Range extent_of(const P& p, int batch) {
  if constexpr (!P::indexed) return {0, p.kv_len};
  long long end = p.kv_len, first = 0;
  if (p.cache_seqlens) end = index_at(p.cache_seqlens, batch, p.cache_seqlens_wide);
  if (p.cache_leftpad) first = index_at(p.cache_leftpad, batch, p.cache_leftpad_wide);
  if (end < 0 || end > p.kv_len || first < 0 || first > end) return Range::invalid();
  return {int(first), int(end)};
}

// The keys of a sequence's extent that its query number `query` of `q_len` sees.
template <class P>
__device__ __forceinline__ Range visible(const P& p, const Range& extent, int query, int q_len) {
  if (!p.causal || !extent.valid()) return extent;
  const int end = min(extent.end, extent.end - q_len + query + 1);
  const int first = p.window ? max(extent.first, end - p.window) : extent.first;
  return {first, max(first, end)};
}

// The keys that row `query` of batch row `batch` sees.
template <class P>
__device__ __forceinline__ Range keys_of_row(const P& p, int batch, int query) {
  if (!P::packed || !p.cu_seqlens) return visible(p, extent_of(p, batch), query, p.q_len);
  // Queries and keys of a sequence are the positions between two offsets; the last offset that is at most `query`:
  int low = 0, high = p.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (index_at(p.cu_seqlens, middle, p.cu_seqlens_wide) <= query)
      low = middle;
    else
      high = middle;
  }
  const long long first = index_at(p.cu_seqlens, low, p.cu_seqlens_wide);
  const long long end = index_at(p.cu_seqlens, low + 1, p.cu_seqlens_wide);
  if (first < 0 || first > query || query >= end || end > p.kv_len) return Range::invalid();
  return visible(p, {int(first), int(end)}, query - int(first), int(end - first));
}
