#pragma once
// Which steps of which rows a block takes. A step is STEP keys of an item; an item is a batch row, a unit of HEADS
// key heads and a block of query rows; the steps of all items in their order are numbered through.

#include "problem.cuh"

struct Item {
  int batch, unit, block;
  int begin, steps;  // number of the first step; steps, a multiple of split_steps where that is pinned
  Range keys;        // keys that a row of the item may see
  int origin;        // the position that the steps are counted from

  __device__ int position(int step) const { return origin + (step - begin) * STEP; }
};

__device__ __forceinline__ int units_of_a_batch(const Problem& p) { return p.kv_heads / HEADS; }

// Where boxes are copied from pages, no step must cross them.
__device__ __forceinline__ int origin_of(const Range& keys) { return BOXES && PAGED ? keys.first / STEP * STEP : keys.first; }

__device__ __forceinline__ int steps_of(const Problem& p, const Range& keys) {
  const int steps = keys.empty() ? 0 : (keys.end - origin_of(keys) + STEP - 1) / STEP;
  return PINNED ? (steps + p.split_steps - 1) / p.split_steps * p.split_steps : steps;
}

__device__ __forceinline__ Item item_of(const Problem& p, int batch, int unit, int block, int begin, const Range& keys) {
  return {batch, unit, block, begin, steps_of(p, keys), keys, origin_of(keys)};
}

// The keys that any query of a batch row sees; later queries see later keys.
__device__ __forceinline__ Range keys_of_batch(const Problem& p, int batch) {
  const Range extent = extent_of(p, batch);
  return {visible(p, extent, 0, p.q_len).first, visible(p, extent, p.q_len - 1, p.q_len).end};
}

// The block's steps, and in equal ranges of all steps those of any other.
struct Schedule {
  int begin, end;
  int share, surplus;  // units of steps that every block takes, and how many blocks take one more
  int unit;            // steps that stay together

  __device__ Schedule() {}
  __device__ Schedule(const Problem& p, int total) : unit(PINNED ? p.split_steps : 1) {
    const unsigned units = PINNED ? total / p.split_steps : total;
    share = units / gridDim.x, surplus = units - share * gridDim.x;
    begin = begin_of(blockIdx.x), end = begin_of(blockIdx.x + 1);
  }
  __device__ int begin_of(int block) const { return (block * share + min(block, surplus)) * unit; }
  __device__ int owner_of(int step) const {
    const unsigned from = surplus * (share + 1);
    return step < from ? unsigned(step) / (share + 1) : surplus + (unsigned(step) - from) / share;
  }
};

// Moves on to the item that holds `step`.
__device__ __forceinline__ void advance(const Problem& p, Item& item, int step) {
#pragma unroll 1
  while (!SINGLE && step >= item.begin + item.steps) {
    item.begin += item.steps;
    if (++item.block < p.row_blocks) continue;
    item.block = 0;
    if (++item.unit < units_of_a_batch(p)) continue;
    item.unit = 0, item.batch++;
    if constexpr (INDEXED) item = item_of(p, item.batch, 0, 0, item.begin, keys_of_batch(p, item.batch));
  }
}

// The item that holds step `step` of a batch row whose first step is `begin`.
__device__ __forceinline__ Item find_in_batch(const Problem& p, int batch, int begin, int step) {
  Item item = item_of(p, batch, 0, 0, begin, keys_of_batch(p, batch));
  const int number = unsigned(step - begin) / unsigned(item.steps);
  item.unit = number / p.row_blocks, item.block = number % p.row_blocks, item.begin = begin + number * item.steps;
  return item;
}

// The block's range among all blocks' equal ones, and the item it begins in; by whole warps, which all find the same.
__device__ __forceinline__ Schedule plan(const Problem& p, Item& item) {
  const int items = units_of_a_batch(p) * p.row_blocks;
  if constexpr (!INDEXED) {
    const int of_a_batch = items * steps_of(p, keys_of_batch(p, 0));
    const Schedule s(p, p.batch * of_a_batch);
    if (s.begin < s.end) {
      const int batch = unsigned(s.begin) / unsigned(of_a_batch);
      item = find_in_batch(p, batch, batch * of_a_batch, s.begin);
    }
    return s;
  }
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int b = lane; b < p.batch; b += 32) sum += steps_of(p, keys_of_batch(p, b));
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  const Schedule s(p, sum * items);
  if (s.begin >= s.end) return s;
  int before = 0;
#pragma unroll 1
  for (int from = 0; from < p.batch; from += 32) {
    const int b = from + lane;
    const int own = b < p.batch ? steps_of(p, keys_of_batch(p, b)) * items : 0;
    int through = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, through, offset);
      if (lane >= offset) through += other;
    }
    const unsigned beyond = __ballot_sync(~0u, before + through > s.begin);
    if (beyond) {
      const int at = __ffs(beyond) - 1;
      item = find_in_batch(p, from + at, before + __shfl_sync(~0u, through - own, at), s.begin);
      return s;
    }
    before += __shfl_sync(~0u, through, 31);
  }
  return s;
}
