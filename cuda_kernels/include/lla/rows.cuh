// A call of the kernels of local linear attention, and where the keys lie that each of its rows sees.
#pragma once

#include "visible_keys.cuh"

namespace lla {

// Mirrored field by field by parameters.py. Strides are in elements: batch or page, position, head.
struct Call {
  static constexpr bool indexed = INDEXED, packed = PACKED;
  const void *q, *k, *v, *cu_seqlens, *cache_seqlens, *cache_leftpad, *page_table;
  void* out;
  const float* ridge;
  // The state, all or none; contiguous.
  float *m, *d1, *k0, *wk, *wv, *wkk, *wvk, *state_q, *state_ridge;
  // Partial moments of splits, and a counter for each row that its last reader resets.
  float* partials;
  unsigned* counters;
  void* mail;  // of rows whose blocks solve them together
  long long q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  long long ridge_stride[3];  // batch, position, head
  long long page_table_stride;
  int q_len, kv_len, q_heads, group_size, head_dim, value_dim;
  int sequences, num_pages, page_size, window, causal;  // window: 0 for none
  int cu_seqlens_wide, cache_seqlens_wide, cache_leftpad_wide, page_table_wide;
  int rows, splits, splits_log2, first_row;  // splits_log2: where they are a power of two
  int blocks_at_once;  // that the device holds, of the tuned kernel
  float ridge_value;  // where ridge is null
  float scale;
};

static_assert(sizeof(Call) == CALL_BYTES, "parameters.py describes another structure");

// A division costs as much as a hundred other instructions, and most numbers are powers of two.
__device__ __forceinline__ unsigned divide(unsigned x, unsigned by) { return by & by - 1 ? x / by : x >> __ffs(by) - 1; }

struct RowIndex {
  int batch, position, head;

  __device__ __forceinline__ RowIndex(const Call& call, unsigned item) {
    const unsigned query = divide(item, call.q_heads);
    head = item - query * call.q_heads;
    batch = query, position = 0;
    if (call.q_len > 1) batch = query / unsigned(call.q_len), position = query - batch * call.q_len;
  }

  // Of the row's first element.
  __device__ __forceinline__ long long offset(const long long (&stride)[3]) const {
    return batch * stride[0] + position * stride[1] + head * stride[2];
  }

  __device__ __forceinline__ float ridge(const Call& call) const {
    if (!call.ridge) return call.ridge_value;
    return call.ridge[offset(call.ridge_stride)];
  }
};

struct Row : RowIndex {
  int kv_head;
  int first, end;  // keys first .. end - 1 are seen
  bool valid;      // lengths in range; a row of an invalid length is NaN and sees nothing

  __device__ __forceinline__ Row(const Call& call, int item) : RowIndex(call, item) {
    kv_head = divide(head, call.group_size);
    const Range seen = keys_of_row(call, batch, position);
    valid = seen.valid();
    first = seen.first, end = max(seen.end, seen.first);
  }

  __device__ __forceinline__ int keys() const { return end - first; }
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
    outer = index_at(call.page_table, batch * call.page_table_stride + key / call.page_size, call.page_table_wide);
    inner = key % call.page_size;
    valid = outer >= 0 && outer < call.num_pages;
#endif
  }

  __device__ __forceinline__ long long offset(const long long (&stride)[3], int head) const {
    return outer * stride[0] + inner * stride[1] + head * stride[2];
  }
};

}  // namespace lla
