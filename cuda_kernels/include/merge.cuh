#pragma once
// From the states of warps and of blocks to the output of a row.

#include "ptx/shared_memory.cuh"
#include "row_state.cuh"
#include "rows.cuh"

__device__ __forceinline__ void store(Element* to, float x) {
  if constexpr (FLOAT)
    *to = x;
  else
    *to = narrow<BFLOAT>(x);
}

// What a row of an item saw; where blocks share items, none is shared whose rows see nothing.
__device__ __forceinline__ Range seen_by(const Problem& p, const Item& item, const Rows& rows, int row) {
  return VARIED || SINGLE ? keys_of_row(p, item.batch, rows.query(row)) : item.keys;
}

// The row's output in WIDTH channels, and its state where that is asked for.
template <int WIDTH>
__device__ __forceinline__ void finish(const Problem& p, const Rows& rows, const Record& record, int channel, const Range& seen,
                                       const RowState<WIDTH>& state) {
  Statistics s = state.s;
  // Scores that are all -inf have no softmax.
  if (!seen.valid() || (!seen.empty() && s.saw_nothing())) s.d1 = quiet_nan();
  const float inverse = 1 / s.d1, c = PROBE ? s.d2 * inverse : 0.f;
  const long long number = rows.number(record.h, record.row);
  Element* out = rows.at<Element>(p.out, p.out_stride, record.h, record.row) + channel;
#pragma unroll
  for (int e = 0; e < WIDTH; e++) {
    float o = state.O1[e] * inverse;
    if constexpr (PROBE) o = (1 + c) * o - state.O2[e] * inverse;
    if (seen.valid() && seen.empty()) o = 0;
    if (p.out) store(out + e, o);
    if (!p.m) continue;
    p.O1[number * VALUE_DIM + channel + e] = state.O1[e];
    if constexpr (PROBE) p.O2[number * VALUE_DIM + channel + e] = state.O2[e];
  }
  if (p.m && channel == 0) {
    p.m[number] = s.m * 0.693147180559945f;
    p.d1[number] = s.d1;
    if constexpr (PROBE) p.d2[number] = s.d2, p.t0[number] = s.t0;
  }
}

// Rows that have no step: 0, or NaN where their lengths are invalid. No block has an item for them.
__device__ __noinline__ void finish_empty_batches(const Problem& p) {
  if (!INDEXED && steps_of(p, keys_of_batch(p, 0))) return;
  for (int batch = blockIdx.x; batch < p.batch; batch += gridDim.x) {
    const Range keys = keys_of_batch(p, batch);
    if (steps_of(p, keys)) continue;
    RowState<1> nothing;
    nothing.clear();
    for (int inner = 0; inner < units_of_a_batch(p) * p.row_blocks; inner++) {
      const Rows rows(p, item_of(p, batch, inner / p.row_blocks, inner % p.row_blocks, 0, keys));
#pragma unroll 1
      for (int i = threadIdx.x; i < RECORDS * VALUE_DIM; i += THREADS) {
        const Record record(i / VALUE_DIM);
        if (record.row < rows.count) finish(p, rows, record, i % VALUE_DIM, keys, nothing);
      }
    }
  }
}

// What a block has seen of an item, in the workspace: statistics of RECORDS rows, then their pairs (O1, O2).
struct Part {
  float* base;
  __device__ float4* statistics(int record) const { return reinterpret_cast<float4*>(base) + record; }
  __device__ float2* sums(int record) const { return reinterpret_cast<float2*>(base + RECORDS * 4 + record * PART_ROW); }
};

// Counts this block among those whose parts are in memory, and returns how many were there before.
__device__ __forceinline__ unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// How parts begin .. end of a row weigh in their sum, by one warp: a weight, or -1 for a part that saw nothing, and a
// shift for each into `factors`, and the statistics of the sum.
template <class PartAt>
__device__ __forceinline__ void weigh_parts(int number, int begin, int end, PartAt part_at, float4* factors, float4* total) {
  const int lane = threadIdx.x % 32, lanes = min(32, end - begin);
  float m = minus_infinity();
  int first = end;
  for (int i = begin + lane; i < end; i += 32) {
    const float4 packed = __ldcg(part_at(i).statistics(number));
    const Statistics x = Statistics::of(packed);
    factors[i - begin] = packed;
    if (!x.saw_nothing()) m = fmaxf(m, x.m), first = min(first, i);
  }
  for (int mask = 1; mask < lanes; mask *= 2) {
    m = fmaxf(m, __shfl_xor_sync(~0u, m, mask));
    first = min(first, __shfl_xor_sync(~0u, first, mask));
  }
  __syncwarp();
  // The first part that saw a key gives the shift, all others move to it.
  const float t0 = first < end ? factors[first - begin].w : 0.f;
  __syncwarp();
  Statistics sum = {m, 0, 0, t0};
  for (int i = begin + lane; i < end; i += 32) {
    const Statistics x = Statistics::of(factors[i - begin]);
    const float factor = x.saw_nothing() ? -1.f : weight(x.m, m), step = x.t0 - t0;
    factors[i - begin] = make_float4(factor, step, 0, 0);
    if (!x.saw_nothing()) sum.d1 += factor * x.d1, sum.d2 += factor * (x.d2 + step * x.d1);
  }
  for (int mask = 1; mask < lanes; mask *= 2) {
    sum.d1 += __shfl_xor_sync(~0u, sum.d1, mask);
    sum.d2 += __shfl_xor_sync(~0u, sum.d2, mask);
  }
  if (lane == 0) *total = sum.packed();
}

// Merges the parts of an item in their order and writes its rows.
template <class PartAt>
__device__ __forceinline__ void merge_parts(const Problem& p, const Item& item, const Rows& rows, char* shared, int parts, PartAt part_at) {
  // Neighbouring lanes share WIDTH channels of a row, each with every LANES-th part: the latency of the second-level
  // cache is all there is to wait for, and is waited for once.
  constexpr int WIDTH = VALUE_DIM % 2 ? 1 : 2, UNITS = RECORDS * VALUE_DIM / WIDTH;
  constexpr int LANES = UNITS * 8 <= THREADS ? 8 : UNITS * 4 <= THREADS ? 4 : UNITS * 2 <= THREADS ? 2 : 1;
  constexpr int BATCH = LANES == 1 ? 8 : 4;
  constexpr int CHUNK = WARPS * EXCHANGE_PITCH / 16 / RECORDS;  // parts that are weighed at a time
  float4* factors = reinterpret_cast<float4*>(shared + EXCHANGE_AT);
  float4* totals = reinterpret_cast<float4*>(shared + TOTALS_AT);
  const int lane = threadIdx.x % LANES;
#pragma unroll 1
  for (int first = 0; first < UNITS * LANES; first += THREADS) {
    const int unit = (first + int(threadIdx.x)) / LANES, number = unit * WIDTH / VALUE_DIM, channel = unit * WIDTH % VALUE_DIM;
    RowState<WIDTH> state;
    state.clear();
#pragma unroll 1
    for (int from = 0; from < parts; from += CHUNK) {
      const int end = min(from + CHUNK, parts);
      float2 pairs[BATCH][WIDTH];
      const auto load = [&](int begin) {
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
          const int i = begin + u * LANES;
          if (i >= end || unit >= UNITS) continue;
          const float2* at = part_at(i).sums(number) + channel;
          if constexpr (WIDTH == 2) {
            const float4 y = __ldcg(reinterpret_cast<const float4*>(at));
            pairs[u][0] = make_float2(y.x, y.y), pairs[u][WIDTH - 1] = make_float2(y.z, y.w);
          } else
            pairs[u][0] = __ldcg(at);
        }
      };
      load(from + lane);
      if (first == 0 || parts > CHUNK) {
        if (first || from) __syncthreads();
        for (int r = threadIdx.x / 32; r < RECORDS; r += WARPS) weigh_parts(r, from, end, part_at, factors + r * CHUNK, totals + r);
        __syncthreads();
      }
      float2 sums[1][WIDTH] = {};
#pragma unroll 1
      for (int begin = from + lane; begin < end; begin += LANES * BATCH) {
        if (begin >= from + LANES) load(begin);
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
          const int i = begin + u * LANES;
          if (i >= end || unit >= UNITS) continue;
          const float2 factor = *reinterpret_cast<const float2*>(factors + number * CHUNK + i - from);
          if (factor.x < 0) continue;
#pragma unroll
          for (int e = 0; e < WIDTH; e++) {
            sums[0][e].x += factor.x * pairs[u][e].x;
            sums[0][e].y += factor.x * (pairs[u][e].y + factor.y * pairs[u][e].x);
          }
        }
      }
      __syncwarp();
#pragma unroll
      for (int mask = 1; mask < LANES; mask *= 2)
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
          sums[0][e].x += __shfl_xor_sync(~0u, sums[0][e].x, mask);
          sums[0][e].y += __shfl_xor_sync(~0u, sums[0][e].y, mask);
        }
      const Statistics total[1] = {Statistics::of(totals[min(number, RECORDS - 1)])};
      state.add(total, sums);
    }
    const Record record(number);
    if (lane == 0 && unit < UNITS && record.row < rows.count)
      finish(p, rows, record, channel, seen_by(p, item, rows, record.row), state);
  }
  if constexpr (!SINGLE) __syncthreads();  // before the shared memory is used again
}

// Puts the weight and the shift of every warp's state towards that of the block into shared memory, and the block's
// statistics.
__device__ __forceinline__ void weigh_warps(char* shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < RECORDS * WARPS; first += THREADS) {
    const int i = first + threadIdx.x, record = i / WARPS, warp = i % WARPS;
    Statistics x = Statistics::none();
    if (record < RECORDS) x = Statistics::of(reinterpret_cast<const float4*>(shared + STATISTICS_AT)[warp * RECORDS + record]);
    Statistics total = {x.saw_nothing() ? minus_infinity() : x.m, 0, 0, 0};
    const unsigned peers = ((1u << WARPS) - 1) << (lane / WARPS * WARPS), seen = __ballot_sync(~0u, !x.saw_nothing()) & peers;
    // The first state that saw a key gives the shift, all others move to it.
    total.t0 = __shfl_sync(~0u, x.t0, seen ? __ffs(seen) - 1 : 0);
#pragma unroll
    for (int mask = 1; mask < WARPS; mask *= 2) total.m = fmaxf(total.m, __shfl_xor_sync(~0u, total.m, mask));
    const float factor = x.saw_nothing() ? 0.f : weight(x.m, total.m), step = x.saw_nothing() ? 0.f : x.t0 - total.t0;
    if (!x.saw_nothing()) total.d1 = factor * x.d1, total.d2 = factor * (x.d2 + step * x.d1);
#pragma unroll
    for (int mask = 1; mask < WARPS; mask *= 2)
      total.d1 += __shfl_xor_sync(~0u, total.d1, mask), total.d2 += __shfl_xor_sync(~0u, total.d2, mask);
    if (record >= RECORDS) continue;
    reinterpret_cast<float2*>(shared + FACTORS_AT)[i] = make_float2(factor, step);
    if (warp == 0) reinterpret_cast<float4*>(shared + TOTALS_AT)[record] = total.packed();
  }
}

// The sums that the warps left in the exchange become one, of which write(record number, channel, state) gets every
// row's channels from `from` on.
template <class Write>
__device__ __forceinline__ void merge_warps(const char* shared, int from, Write write) {
  // The rows of a channel follow one another, as the lanes that wrote them do; two of them are loaded at a time.
  constexpr int PAIR = QUERIES > 1 ? 2 : 1;
#pragma unroll 1
  for (int first = threadIdx.x * PAIR; first < RECORDS * EXCHANGE_CHANNELS; first += THREADS * PAIR) {
    const int channel = from + first / QUERIES % EXCHANGE_CHANNELS, number = first / (EXCHANGE_CHANNELS * QUERIES) * QUERIES + first % QUERIES;
    if (channel >= VALUE_DIM) continue;
    RowState<1> state[PAIR];
#pragma unroll
    for (int e = 0; e < PAIR; e++) {
      state[e].s = Statistics::of(reinterpret_cast<const float4*>(shared + TOTALS_AT)[number + e]);
      state[e].O1[0] = state[e].O2[0] = 0;
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float2* exchange = reinterpret_cast<const float2*>(shared + EXCHANGE_AT + w * EXCHANGE_PITCH);
      float2 sums[PAIR];
      if constexpr (PAIR == 2) {
        const float4 x = *reinterpret_cast<const float4*>(exchange + first);
        sums[0] = make_float2(x.x, x.y), sums[PAIR - 1] = make_float2(x.z, x.w);
      } else
        sums[0] = exchange[first];
#pragma unroll
      for (int e = 0; e < PAIR; e++) {
        const float2 factor = reinterpret_cast<const float2*>(shared + FACTORS_AT)[(number + e) * WARPS + w];
        state[e].O1[0] += factor.x * sums[e].x, state[e].O2[0] += factor.x * (sums[e].y + factor.y * sums[e].x);
      }
    }
#pragma unroll
    for (int e = 0; e < PAIR; e++) write(number + e, channel, state[e]);
  }
}
