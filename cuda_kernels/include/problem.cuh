#pragma once
// What a launch computes: the arguments of every attention kernel.

#include "shape.cuh"
#include "visible_keys.cuh"

// Mirrored field by field by parameters.py. Strides are in elements: batch or page, position, head.
struct Problem {
  static constexpr bool indexed = INDEXED, packed = PACKED;
  const void *q, *r, *k, *v, *cu_seqlens, *cache_seqlens, *cache_leftpad, *page_table;
  void* out;
  float *m, *d1, *d2, *O1, *O2, *t0;
  float* partials;  // or the parcels that blocks send each other
  unsigned* counters;
  long long q_stride[3], r_stride[3], k_stride[3], v_stride[3], out_stride[3];
  long long page_table_stride;  // of batch rows
  int batch, q_len, kv_len, q_heads, kv_heads;
  int sequences, num_pages, window, causal;
  int cu_seqlens_wide, cache_seqlens_wide, cache_leftpad_wide, page_table_wide;
  int row_blocks, split_steps, share, surplus;
  float scale_log2;  // of scores in units of log 2
};

static_assert(sizeof(Problem) == PROBLEM_BYTES, "parameters.py describes another structure");
