#pragma once
// Where the copy engine finds the keys of a box.

#include "lla/rows.cuh"

// Where the first box of a row begins: where its page allows.
__device__ __forceinline__ int begin_of_boxes(const lla::Row& row) { return PAGED ? row.first / BOX * BOX : row.first; }

struct Box {
  int outer, place;  // batch or page, and the first key in it
  bool present;

  // From `position` on, of a row whose keys end at `end`; an entry outside the cache sets `bad_page`, and is not read.
  __device__ __forceinline__ Box(const lla::Call& call, int batch, int position, int end, unsigned& bad_page)
      : outer(batch), place(position), present(position < end) {
#if PAGED
    if (present) {
      const long long page = index_at(call.page_table, batch * call.page_table_stride + position / call.page_size,
                                      call.page_table_wide);
      present = page >= 0 && page < call.num_pages;
      if (!present) atomicMax(&bad_page, 1);
      outer = static_cast<int>(page);
    }
    place = position % call.page_size;
#endif
  }
};
