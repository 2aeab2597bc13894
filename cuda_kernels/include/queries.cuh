#pragma once
// The query rows of an item on their way from global to shared memory: fetched into registers an item ahead, since a
// load that waits behind the streams of keys takes as long as those are deep.

#include "rows.cuh"

struct Queries {
  static constexpr int ARRAYS = PROBE ? 2 : 1;
  static constexpr int ELEMENTS = ARRAYS * RECORDS * KEY_COLUMNS;
  static constexpr int EACH = (ELEMENTS + THREADS - 1) / THREADS;
  unsigned bits[EACH];

  __device__ void fetch(const Problem& p, const Rows& rows) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int element = threadIdx.x + i * THREADS, d = element % KEY_COLUMNS, number = element / KEY_COLUMNS;
      const Record record(number % RECORDS);
      bits[i] = 0;
      if (element >= ELEMENTS || record.row >= rows.count || d >= HEAD_DIM) continue;
      if (number < RECORDS)
        bits[i] = raw(rows.at<const Element>(p.q, p.q_stride, record.h, record.row) + d);
      else if (PROBE == 2)
        bits[i] = raw(rows.at<const float>(p.r, p.r_stride, record.h, record.row) + d);
      else
        bits[i] = raw(rows.at<const Element>(p.r, p.r_stride, record.h, record.row) + d);
    }
  }

  // Clears what no record is written to, once.
  __device__ static void clear(Element* to) {
    for (int i = threadIdx.x; i < (1 + PROBE) * QUERY_ARRAY; i += THREADS) to[i] = 0;
  }

  // Arrays of q, of r, and of what a float32 probe is more than its rounding, each of all rows.
  __device__ void deposit(Element* to) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int element = threadIdx.x + i * THREADS, d = element % KEY_COLUMNS, number = element / KEY_COLUMNS;
      if (element >= ELEMENTS) continue;
      const Record record(number % RECORDS);
      Element* place = to + number / RECORDS * QUERY_ARRAY + (record.h * ROWS + record.row) * QUERY_PITCH + d;
      if constexpr (FLOAT) {
        *place = __uint_as_float(bits[i]);
      } else if (PROBE == 2 && number >= RECORDS) {
        const float r = __uint_as_float(bits[i]);
        *place = narrow<BFLOAT>(r);
        const float rest = r - widen<BFLOAT>(*place);
        // Infinity less itself is no number, and is in the rounding already.
        place[QUERY_ARRAY] = rest == rest ? narrow<BFLOAT>(rest) : half_bits(0);
      } else
        *place = static_cast<half_bits>(bits[i]);
    }
  }

 private:
  __device__ static unsigned raw(const half_bits* x) { return __ldg(x); }
  __device__ static unsigned raw(const float* x) { return __float_as_uint(__ldg(x)); }
};
