// A call of lla_decode, the keys each of its rows sees and where they lie; both kernels' only view of lengths,
// windows and pages. NVRTC has no <stdint.h> here: long long is 64 bits on every platform with CUDA.
#pragma once

namespace lla {

// Laid out as the launcher's structured dtype: pointers, strides in elements, then 4-byte numbers.
struct Call {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  const void* cache_seqlens;
  const void* cache_leftpad;
  const void* page_table;
  const float* ridge;
  // The state, all or none; contiguous.
  float* m;
  float* d1;
  float* k0;
  float* wk;
  float* wv;
  float* wkk;
  float* wvk;
  float* state_q;
  float* state_ridge;
  // Split rows only: partial moments, and a counter for each row that its last reader resets.
  float* partials;
  unsigned* counters;
  long long q_stride[3];  // batch, position, head
  long long k_stride[3];
  long long v_stride[3];
  long long out_stride[3];
  long long ridge_stride[3];
  int q_len;
  int q_heads;
  int group_size;
  int kv_len;
  int window_size;  // 0: none
  int page_size;
  int num_pages;
  int wide_indices;  // bits: cache_seqlens, cache_leftpad, page_table are int64
  int head_dim;
  int value_dim;
  int splits;
  float ridge_value;  // where ridge is null
  float scale;
  int first_row;
};

__device__ __forceinline__ long long index_at(const void* indices, long long i, bool wide) {
  return wide ? static_cast<const long long*>(indices)[i] : static_cast<const int*>(indices)[i];
}

struct Row {
  int batch, position, head, kv_head;
  int first, end;  // keys first .. end - 1 are seen
  bool valid;      // lengths in range; a row of an invalid length is NaN and sees nothing

  __device__ __forceinline__ Row(const Call& call, int item) {
    head = item % call.q_heads;
    position = item / call.q_heads % call.q_len;
    batch = item / call.q_heads / call.q_len;
    kv_head = head / call.group_size;
    long long length = call.kv_len, pad = 0;
    if (call.cache_seqlens) length = index_at(call.cache_seqlens, batch, call.wide_indices & 1);
    if (call.cache_leftpad) pad = index_at(call.cache_leftpad, batch, call.wide_indices & 2);
    valid = length >= 0 && length <= call.kv_len && pad >= 0 && pad <= length;
    first = end = 0;
    if (valid) {
      end = static_cast<int>(length) - call.q_len + position + 1;
      first = static_cast<int>(pad);
      if (call.window_size) first = max(first, end - call.window_size);
      end = max(end, first);
    }
  }

  __device__ __forceinline__ int keys() const { return end - first; }

  __device__ __forceinline__ float ridge(const Call& call) const {
    if (!call.ridge) return call.ridge_value;
    return call.ridge[batch * call.ridge_stride[0] + position * call.ridge_stride[1] + head * call.ridge_stride[2]];
  }
};

// Where one key lies; with pages, `valid` is false for an entry outside the cache, whose key is not read.
struct Place {
  long long outer, inner;
  bool valid;

  __device__ __forceinline__ Place(const Call& call, int batch, int key) {
    outer = batch;
    inner = key;
    valid = true;
#if PAGED
    const int pages = call.kv_len / call.page_size;
    outer = index_at(call.page_table, static_cast<long long>(batch) * pages + key / call.page_size,
                     call.wide_indices & 4);
    inner = key % call.page_size;
    valid = outer >= 0 && outer < call.num_pages;
#endif
  }

  __device__ __forceinline__ long long offset(const long long (&stride)[3], int head) const {
    return outer * stride[0] + inner * stride[1] + head * stride[2];
  }
};

}  // namespace lla
