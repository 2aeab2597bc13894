#pragma once
// A ring of slots in shared memory, which the warp that reads it fills ahead of its reading: keys and values of its steps in
// turn. Nothing is shared between warps, so that none waits for another; or a warpgroup has a ring together, which its first
// warp fills.
//
// A row is HEADS adjacent heads of one position. BOXES are brought by the copy engine; other rows by the lanes
// together, 16 bytes at a time where ALIGNED, element by element otherwise.

#include "begin_barriers.cuh"
#include "delay.cuh"
#include "maps.cuh"
#include "ptx/copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "schedule.cuh"

struct Ring {
  const Maps* maps;
  char* slots;
  unsigned barriers;
  int lane;
  int slot;     // the one to be read next, and to be filled once it was read
  int read;     // of a warpgroup, which reads on before all of its warps have read a slot: the oldest such one
  unsigned parity;
  bool written;  // whether a slot was written by ordinary stores since the copy engine was last told
  bool fills;    // whether this warp fills the ring

  // Slots that are asked for ahead of all else that a block begins with: the sooner the first, the sooner memory has something to do.
  static constexpr int FIRST = BOXES ? 1 : 0;

  Item item;  // of the step that is copied next
  int step, end;
  int split_end;  // of the steps that stay together, where ranges are pinned
  bool values_next;
  long long outer;  // batch row or page, and position in it, of the step or of this lane's row; -1: none, -2: no such page
  int place;
  // Where a step comes from several pages, or few steps from one, the lanes look up 32 pages together: a look would be waited
  // for as long as the copies ahead of it take.
  static constexpr bool LOOKS_AHEAD = BOXES && PAGED && (WARPGROUPS || PAGE < 4 * STEP);
  int page, first_page, batch_of_pages;

  // Before loads are on their way: the fence would wait for them.
  __device__ void prepare(const Maps* tensor_maps, char* shared) {
    // From a shuffle, or the compiler would not know that it is the warp's, and the copy engine's instructions would be
    // preceded by a loop over the lanes.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), ring = warp / STEP_WARPS;
    maps = tensor_maps;
    lane = threadIdx.x % 32;
    slots = shared + RING_AT + ring * SLOTS * SLOT_BYTES;
    barriers = shared_address(shared + BARRIERS_AT) + ring * SLOTS * 8;
    slot = 0, read = 0, parity = 0, written = false;
    fills = warp % STEP_WARPS == 0;
    if constexpr (BOXES) {
      begin_barriers_of<0, FIRST>();
    } else {
      // Padding columns are read as well, and never written again.
#pragma unroll 1
      for (int i = lane; i < SLOTS * SLOT_BYTES / 16; i += 32)
        reinterpret_cast<uint4*>(slots)[i] = make_uint4(0, 0, 0, 0);
      __syncwarp();
    }
  }

  // Fills the first slots.
  __device__ void start(const Problem& p, const Item& first, int begin, int end_of_range) {
    item = first, step = begin + __shfl_sync(~0u, threadIdx.x / 32, 0) / STEP_WARPS, end = end_of_range, values_next = false;
    split_end = PINNED ? begin + p.split_steps : 0;
    if (LOOKS_AHEAD) batch_of_pages = -1;
    deal(p);
    find_place(p);
#pragma unroll 1
    for (int s = 0; s < FIRST && fills; s++) fill(p, s);
  }

  // Fills the others.
  __device__ void fill_up(const Problem& p) {
    if constexpr (BOXES) begin_barriers_of<FIRST, SLOTS>();
#pragma unroll 1
    for (int s = FIRST; s < SLOTS && fills; s++) fill(p, s);
  }

  __device__ char* wait() {
    delay();
    if constexpr (BOXES)
      mbarrier_wait(barriers + slot * 8, parity);
    else
      copy_wait<SLOTS - 1>(), __syncwarp();
    char* found = slots + slot * SLOT_BYTES;
    if (WARPGROUPS && ++slot == SLOTS) slot = 0, parity ^= 1;
    return found;
  }

  // The slot has been read: fill it again and move on to the next.
  __device__ void release(const Problem& p) {
    if constexpr (WARPGROUPS) {
      delay();
      // The warps of the ring have met since.
      if (fills) fill(p, read);
      if (++read == SLOTS) read = 0;
      return;
    }
    __syncwarp();
    delay();
    fill(p, slot);
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }

 private:
  // Slots BEGIN to END; by a warp.
  template <int BEGIN, int END>
  __device__ void begin_barriers_of() const {
    if (fills) begin_barriers<BEGIN, END>(barriers, 1, lane);
    __syncwarp();
  }

  // Every split deals its steps to the warps anew, so that they do not depend on where it lies.
  __device__ void deal(const Problem& p) {
    while (PINNED && step >= split_end && split_end < end) step = split_end + threadIdx.x / 32, split_end += p.split_steps;
  }

  // Where this lane's box or row of the step lies.
  __device__ void find_place(const Problem& p) {
    outer = -1;
    if (step >= end) return;
    advance(p, item, step);
    const int position = item.position(step) + (BOXES ? 0 : lane);
    if (lane >= (BOXES ? 32 : STEP) || position >= item.keys.end) return;
    outer = item.batch, place = position;
    if constexpr (LOOKS_AHEAD) {
      const int number = position / PAGE;
      // A warpgroup's step may have keys of several.
      constexpr int FURTHER = WARPGROUPS ? STEP / BOX - 1 : 0;
      if (item.batch != batch_of_pages || number < first_page || number + FURTHER - first_page >= 32) {
        batch_of_pages = item.batch, first_page = number;
        page = -2;
        if ((number + lane) * PAGE < item.keys.end) {
          const long long found = index_at(p.page_table, item.batch * p.page_table_stride + number + lane, p.page_table_wide);
          if (found >= 0 && found < p.num_pages) page = int(found);
        }
      }
      outer = __shfl_sync(~0u, page, number - first_page), place = position % PAGE;
    } else if constexpr (PAGED) {
      const long long at = item.batch * p.page_table_stride + position / PAGE;
      outer = index_at(p.page_table, at, p.page_table_wide), place = position % PAGE;
      if (outer < 0 || outer >= p.num_pages) outer = -2;
    }
  }

  __device__ void fill(const Problem& p, int s) {
    if (step < end) {
      char* to = slots + s * SLOT_BYTES;
      if constexpr (BOXES && WARPGROUPS && BOX < STEP) {
        copy_pages(p, to, barriers + s * 8);
      } else if constexpr (BOXES) {
        copy_boxes(p, to, barriers + s * 8);
      } else {
        const Element* from = nullptr;
        if (outer >= 0) {
          const int head = item.unit * HEADS;
          from = static_cast<const Element*>(values_next ? p.v : p.k);
          const long long(&stride)[3] = values_next ? p.v_stride : p.k_stride;
          from += outer * stride[0] + place * stride[1] + head * stride[2];
        }
        if (values_next)
          copy_rows<VALUE_DIM>(to, from);
        else
          copy_rows<HEAD_DIM>(to, from);
      }
      if (values_next) step += RINGS, deal(p), find_place(p);
      values_next = !values_next;
    }
    if constexpr (!BOXES) copy_commit();
  }

  // A key of NaN makes every row that sees it NaN: so do those of a page that does not exist, in every head.
  __device__ static Element absent() { return FLOAT ? Element(quiet_nan()) : Element(0x7fff); }

  // By one lane, the same for the whole warp.
  __device__ void copy_boxes(const Problem& p, char* to, unsigned barrier) {
    const int bytes = BOX * (values_next ? VALUE_BYTES : KEY_BYTES);
    if (PAGED && outer == -2) {
      for (int i = lane; i < HEADS * STEP; i += 32)
        *reinterpret_cast<Element*>(to + place_of<KEY_BYTES>(i % STEP, i / STEP * HEAD_BYTES)) = absent();
      written = true;
    }
    if (written) {
      fence_async_proxy();
      __syncwarp();
      written = false;
    }
    if (lane == 0) {
      // The second box of a last step may hold nothing.
      const bool both = BOX < STEP && item.position(step) + BOX < item.keys.end;
      mbarrier_arrive_expect(barrier, outer >= 0 ? (both ? 2 * bytes : bytes) : 0);
      if (outer >= 0) {
        const TensorMap& map = values_next ? maps->v : maps->k;
        box_copy<READ_ONCE>(shared_address(to), map, 0, place, 0, item.unit, int(outer), barrier);
        if (both) box_copy<READ_ONCE>(shared_address(to) + bytes, map, 0, place + BOX, 0, item.unit, int(outer), barrier);
      }
    }
  }

  // A step of several pages, every run of a page's keys by a lane of its own.
  __device__ void copy_pages(const Problem& p, char* to, unsigned barrier) {
    constexpr int PARTS = STEP / BOX, KEYS = BOX > 0 ? BOX : 1;
    const int part = lane % PARTS, run = lane / PARTS, position = item.position(step) + part * KEYS;
    const bool inside = position < item.keys.end;
    const int found = __shfl_sync(~0u, page, inside ? position / PAGE - first_page : 0);
    const unsigned absent_parts = __ballot_sync(~0u, inside && found < 0) & ((1u << PARTS) - 1);
    if (absent_parts) {
      for (int i = lane; i < HEADS * STEP; i += 32)
        if (absent_parts >> i % STEP / KEYS & 1) *reinterpret_cast<Element*>(to + place_of<KEY_BYTES>(i % STEP, i / STEP * HEAD_BYTES)) = absent();
      fence_async_proxy();
    }
    const unsigned there = __ballot_sync(~0u, inside && found >= 0) & ((1u << PARTS) - 1);
    const int row_bytes = values_next ? VALUE_BYTES : KEY_BYTES;
    if (lane == 0) mbarrier_arrive_expect(barrier, __popc(there) * KEYS * row_bytes);
    __syncwarp();
    if (!(there >> part & 1) || run >= row_bytes / 128) return;
    box_copy<READ_ONCE>(shared_address(to) + (run * STEP + part * KEYS) * 128, values_next ? maps->v : maps->k, 0, position % PAGE, run, item.unit, found, barrier);
  }

  template <int COLUMNS>
  __device__ void copy_rows(char* to, const Element* row) {
    constexpr int PIECE = ALIGNED ? 16 : int(sizeof(Element));
    constexpr int PIECES = HEADS * COLUMNS * int(sizeof(Element)) / PIECE;
    const unsigned long long address = outer == -2 ? 1 : reinterpret_cast<unsigned long long>(row);
#pragma unroll(ALIGNED ? 8 : 1)
    for (int i = lane; i < round_up(STEP * PIECES, 32); i += 32) {
      const int number = i / PIECES, offset = i % PIECES * PIECE;
      const unsigned long long source = __shfl_sync(~0u, address, number % STEP);
      if (number >= STEP || !source) continue;
      char* place = to + number * PITCH + offset;
      const char* from = reinterpret_cast<const char*>(source) + offset;
      if (PAGED && source == 1) {
        // A piece holds the first channel of at most one head.
        if (offset % (COLUMNS * int(sizeof(Element))) == 0) *reinterpret_cast<Element*>(place) = absent();
      } else if constexpr (ALIGNED)
        copy_16(shared_address(place), from);
      else
        *reinterpret_cast<Element*>(place) = *reinterpret_cast<const Element*>(from);
    }
  }
};

// Clears what no row sees of the values of a step, whose first key is `key`: it may hold anything, and a weight of 0 times NaN is
// NaN. By all threads that take the step, of which this is number `thread`.
__device__ __forceinline__ void clear_hidden(char* values, int key, const Range& visible, int thread) {
  constexpr int PIECES = VALUE_BYTES / 16;
#pragma unroll 1
  for (int i = thread; i < STEP * PIECES; i += 32 * STEP_WARPS)
    if (key + i / PIECES < visible.first || key + i / PIECES >= visible.end)
      *reinterpret_cast<uint4*>(values + place_of<VALUE_BYTES>(i / PIECES, i % PIECES * 16)) = make_uint4(0, 0, 0, 0);
}
