#pragma once
// The tiled loop over keys of softmax and Parallax attention, and of LLA once its probe is solved.
//
// A block takes a range of steps (schedule.cuh); its warps take the steps in turn, each with a ring of its own, and
// meet where the range leaves an item. What a block has seen of an item that it shares with others goes to the
// workspace; the last block to arrive there merges all parts in their order and writes the output.

#include "float_tile.cuh"
#include "half_tile.cuh"
#include "ring.cuh"
#include "row_state.cuh"

template <bool F>
struct TileOf {
  typedef HalfTile type;
};
template <>
struct TileOf<true> {
  typedef FloatTile type;
};
typedef TileOf<FLOAT>::type Tile;

// The rows of an item: number `row` of the block of rows is query row / group of head row % group.
struct Rows {
  const Problem& p;
  int batch, head, first, count;  // head: the first key head; count: rows of a key head that exist

  __device__ Rows(const Problem& p, const Item& item)
      : p(p), batch(item.batch), head(item.inner / p.row_blocks * HEADS), first(item.inner % p.row_blocks * ROWS) {
    count = min(ROWS, p.q_len * GROUP - first);
  }
  __device__ int query(int row) const { return (first + row) / GROUP; }
  __device__ int query_head(int h, int row) const { return (head + h) * GROUP + (first + row) % GROUP; }
  __device__ long long number(int h, int row) const {
    return (1ll * batch * p.q_len + query(row)) * p.q_heads + query_head(h, row);
  }
  template <class T>
  __device__ T* at(const void* base, const long long (&stride)[3], int h, int row) const {
    if (row >= count) return nullptr;
    return const_cast<T*>(static_cast<const T*>(base)) + batch * stride[0] + query(row) * stride[1] + query_head(h, row) * stride[2];
  }
};

// What a lane accumulates of its query rows.
struct Accumulator {
  float m[HEADS][TILES], t0[HEADS][TILES];
  float d1[HEADS][TILES], d2[HEADS][TILES];  // of the lane's own keys
  float spread[HEADS][TILES];                // sum of p |t - t0| since t0 last moved
  float scale[HEADS][TILES];                 // O2 is kept in units of it where P2 could overflow float16
  float O1[HEADS][TILES][CHANNELS], O2[HEADS][TILES][CHANNELS];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        m[h][n] = minus_infinity();
        t0[h][n] = d1[h][n] = d2[h][n] = spread[h][n] = 0;
        scale[h][n] = 1;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) O1[h][n][i] = O2[h][n][i] = 0;
      }
  }
};

// The sum, or the largest, over the lanes that share a query row, in all of them.
__device__ __forceinline__ float sum_of_row(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}
__device__ __forceinline__ float largest_of_row(float x) {
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// Scores of a step become weights, and the running sums move on. c: S1, S2 of key g and of key g + 8, then P1, P2.
__device__ __forceinline__ void weigh(Accumulator& a, int h, int n, float (&c)[4], bool masked, bool sees_low, bool sees_high,
                                      float scale_log2) {
  float s0 = c[0] * scale_log2, s1 = c[2] * scale_log2;
  float u0 = c[1], u1 = c[3];
  if (masked) {
    // What is hidden may be NaN, which a weight of 0 would not silence.
    if (!sees_low) s0 = minus_infinity(), u0 = 0;
    if (!sees_high) s1 = minus_infinity(), u1 = 0;
  }
  const float m = fmaxf(a.m[h][n], largest_of_row(fmaxf(s0, s1)));
  if (__any_sync(~0u, m != a.m[h][n])) {
    const float correction = weight(a.m[h][n], m);
    a.d1[h][n] *= correction, a.d2[h][n] *= correction, a.spread[h][n] *= correction;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) a.O1[h][n][i] *= correction, a.O2[h][n][i] *= correction;
    a.m[h][n] = m;
  }
  const float p0 = weight(s0, m), p1 = weight(s1, m);
  a.d1[h][n] += p0 + p1;
  c[0] = p0, c[2] = p1;
  if constexpr (!PROBE) {
    c[1] = c[3] = 0;
    return;
  }
  if (masked) {
    if (!sees_low) u0 = a.t0[h][n];
    if (!sees_high) u1 = a.t0[h][n];
  }
  float x0 = p0 * (u0 - a.t0[h][n]), x1 = p1 * (u1 - a.t0[h][n]);
  a.d2[h][n] += x0 + x1;
  a.spread[h][n] += fabsf(x0) + fabsf(x1);
  if constexpr (!FLOAT) {
    // P2 is about to be rounded: its error is that of P1 as long as t - t0 is about 1, and that of t's own spread
    // beyond. A lane whose keys' mean lies further from t0 calls for a look at the row's.
    const bool drifted = fabsf(a.d2[h][n]) > fmaxf(a.d1[h][n], 0.5f * a.spread[h][n]);
    if (__any_sync(~0u, drifted)) {
      const float d1 = sum_of_row(a.d1[h][n]), d2 = sum_of_row(a.d2[h][n]);
      // Neither NaN nor infinity moves a shift: they would reach rows' sums by another way than the formula's.
      const float step = fabsf(d2) > d1 && fabsf(d2) < 3e38f ? d2 / d1 : 0.f;
      if (step != 0) {
        const float scaled = step / a.scale[h][n];
        a.t0[h][n] += step;
        a.d2[h][n] -= step * a.d1[h][n];
        a.spread[h][n] = 0;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) a.O2[h][n][i] -= scaled * a.O1[h][n][i];
        x0 = p0 * (u0 - a.t0[h][n]), x1 = p1 * (u1 - a.t0[h][n]);
        if (masked) {
          if (!sees_low) x0 = 0;
          if (!sees_high) x1 = 0;
        }
      }
    }
    if constexpr (!BFLOAT) {
      const float inverse = 1 / a.scale[h][n];
      x0 *= inverse, x1 *= inverse;
      if (__any_sync(~0u, fmaxf(fabsf(x0), fabsf(x1)) > 32768.f)) {
        const float largest = largest_of_row(fmaxf(fabsf(x0), fabsf(x1)));
        if (largest > 32768.f && largest < 3e38f) {
          // A power of two, so that nothing is rounded.
          const float factor = exp2f(-ceilf(log2f(largest / 16384.f)));
          a.scale[h][n] /= factor;
          x0 *= factor, x1 *= factor;
#pragma unroll
          for (int i = 0; i < CHANNELS; i++) a.O2[h][n][i] *= factor;
        }
      }
    }
  }
  c[1] = x0, c[3] = x1;
}

template <bool F>
__device__ __forceinline__ float to_float(Element x) {
  if constexpr (F)
    return x;
  else
    return widen<BFLOAT>(x);
}

// O1 += P1 V and O2 += P2 V over the keys that a row sees alone, where a hidden value is not finite.
template <class Sees>
__device__ __forceinline__ void accumulate_visible(const char* values, int lane, const float (&w)[HEADS][TILES][4], Sees sees,
                                                Accumulator& a) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int j = 0; j < STEP; j++) {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const float p1 = __shfl_sync(~0u, j < 8 ? w[h][n][0] : w[h][n][2], j % 8 * 4 + t);
        const float p2 = __shfl_sync(~0u, j < 8 ? w[h][n][1] : w[h][n][3], j % 8 * 4 + t);
        if (!sees(n, j)) continue;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
          const int at = (h * VALUE_COLUMNS + Tile::channel(i, g)) * int(sizeof(Element));
          const float v = to_float<FLOAT>(*reinterpret_cast<const Element*>(values + place_of<VALUE_BYTES>(j, at)));
          a.O1[h][n][i] += p1 * v, a.O2[h][n][i] += p2 * v;
        }
      }
  }
}

// Whether the values of a step, padding included, are all finite.
__device__ __forceinline__ bool all_finite(const char* values, int lane) {
  bool finite = true;
  constexpr int PIECES = VALUE_BYTES / 16;
  for (int i = lane; i < STEP * PIECES; i += 32) {
    const uint4 x = *reinterpret_cast<const uint4*>(values + place_of<VALUE_BYTES>(i / PIECES, i % PIECES * 16));
    for (unsigned word : {x.x, x.y, x.z, x.w}) {
      if (FLOAT)
        finite = finite && (word & 0x7f800000u) != 0x7f800000u;
      else {
        constexpr unsigned LARGEST = BFLOAT ? 0x7f80u : 0x7c00u;
        finite = finite && (word & LARGEST) != LARGEST && (word >> 16 & LARGEST) != LARGEST;
      }
    }
  }
  return __all_sync(~0u, finite);
}

__device__ __forceinline__ void store(Element* to, float x) {
  if constexpr (FLOAT)
    *to = x;
  else
    *to = narrow<BFLOAT>(x);
}

// What a row of an item saw; blocks share no item whose rows see nothing.
__device__ __forceinline__ Range seen_by(const Problem& p, const Item& item, const Rows& rows, int row) {
  return VARIED || WHOLE ? keys_of_row(p, item.batch, rows.query(row)) : item.keys;
}

// The row's output in one channel, and its state where that is asked for.
__device__ __forceinline__ void finish(const Problem& p, const Rows& rows, int h, int row, int channel, const Range& seen, Statistics s,
                                       float O1, float O2) {
  // Scores that are all -inf have no softmax.
  if (!seen.valid() || (!seen.empty() && s.saw_nothing())) s.d1 = quiet_nan();
  const float vbar = O1 / s.d1;
  float o = vbar;
  if constexpr (PROBE) o = (1 + s.d2 / s.d1) * vbar - O2 / s.d1;
  if (seen.valid() && seen.empty()) o = 0;
  if (p.out) store(rows.at<Element>(p.out, p.out_stride, h, row) + channel, o);
  if (!p.m) return;
  const long long number = rows.number(h, row);
  p.O1[number * VALUE_DIM + channel] = O1;
  if constexpr (PROBE) p.O2[number * VALUE_DIM + channel] = O2;
  if (channel == 0) {
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
    for (int inner = 0; inner < items_of_a_batch(p); inner++) {
      const Rows rows(p, item_of(p, batch, inner, 0, keys));
#pragma unroll 1
      for (int i = threadIdx.x; i < HEADS * rows.count * VALUE_DIM; i += THREADS) {
        const int row = i / VALUE_DIM;
        finish(p, rows, row / rows.count, row % rows.count, i % VALUE_DIM, keys, Statistics::none(), 0, 0);
      }
    }
  }
}

// A part of an item: statistics of RECORDS rows, then their pairs (O1, O2).
constexpr int PART_FLOATS = RECORDS * (4 + round_up(2 * VALUE_DIM, 4));

struct Part {
  float* base;
  __device__ float4* statistics(int record) const { return reinterpret_cast<float4*>(base) + record; }
  __device__ float2* sums(int record) const {
    return reinterpret_cast<float2*>(base + RECORDS * 4 + record * round_up(2 * VALUE_DIM, 4));
  }
};

struct Record {
  int h, row;
  __device__ explicit Record(int number) : h(number / (TILES * QUERIES)), row(number / QUERIES % TILES * 4 + number % QUERIES) {}
  __device__ static int number(int h, int n, int t) { return (h * TILES + n) * QUERIES + t; }
};

// Merges the parts of an item in their order and writes its rows.
template <class PartAt>
__device__ __forceinline__ void merge_parts(const Problem& p, const Item& item, const Rows& rows, int parts, PartAt part_at) {
  constexpr int UNROLL = 8;  // loads in flight: the latency of the second-level cache is all there is to wait for
#pragma unroll 1
  for (int i = threadIdx.x; i < RECORDS * VALUE_DIM; i += THREADS) {
    const int number = i / VALUE_DIM, channel = i % VALUE_DIM;
    const Record record(number);
    if (record.row >= rows.count) continue;
    Statistics s = Statistics::none();
    float O1 = 0, O2 = 0;
#pragma unroll 1
    for (int from = 0; from < parts; from += UNROLL) {
      Statistics x[UNROLL];
      float2 sums[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        x[u] = Statistics::none(), sums[u] = make_float2(0, 0);
        if (from + u >= parts) continue;
        const Part part = part_at(from + u);
        const float4 y = __ldcg(part.statistics(number));
        x[u] = {y.x, y.y, y.z, y.w};
        sums[u] = __ldcg(part.sums(number) + channel);
      }
      float m = s.m;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) m = fmaxf(m, x[u].m);
      // The first part that saw a key gives the shift, all others move to it.
#pragma unroll
      for (int u = UNROLL - 1; u >= 0; u--)
        if (s.saw_nothing() && !x[u].saw_nothing()) s.t0 = x[u].t0;
      const float correction = s.saw_nothing() ? 0.f : weight(s.m, m);
      s.d1 *= correction, s.d2 *= correction, O1 *= correction, O2 *= correction, s.m = m;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        if (x[u].saw_nothing()) continue;
        const float factor = weight(x[u].m, m), step = x[u].t0 - s.t0;
        s.d1 += factor * x[u].d1, s.d2 += factor * (x[u].d2 + step * x[u].d1);
        O1 += factor * sums[u].x, O2 += factor * (sums[u].y + step * sums[u].x);
      }
    }
    finish(p, rows, record.h, record.row, channel, seen_by(p, item, rows, record.row), s, O1, O2);
  }
}

// The warps' states of an item become one, of which write(record number, channel, statistics, O1, O2) gets every channel.
template <class Write>
__device__ __forceinline__ void merge_warps(char* shared, Accumulator& a, int lane, Write write) {
  const int warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float4* statistics = reinterpret_cast<float4*>(shared + STATISTICS_AT);
  float2* exchange = reinterpret_cast<float2*>(shared + EXCHANGE_AT);
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const float d1 = sum_of_row(a.d1[h][n]), d2 = PROBE ? sum_of_row(a.d2[h][n]) : 0.f;
      if (g == 0) statistics[((h * TILES + n) * WARPS + warp) * 4 + t] = make_float4(a.m[h][n], d1, d2, a.t0[h][n]);
    }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      // Lane (g, t) looks at row t of warp g.
      const float4 x = g < WARPS ? statistics[((h * TILES + n) * WARPS + g) * 4 + t] : make_float4(minus_infinity(), 0, 0, 0);
      Statistics s = {largest_of_row(x.x), 0, 0, 0};
      const float weight_of_warp = x.y == 0 ? 0.f : weight(x.x, s.m);
      s.d1 = sum_of_row(weight_of_warp * x.y);
      float step_of_warp = 0;
      if constexpr (PROBE) {
        s.t0 = sum_of_row(x.y == 0 ? 0.f : weight_of_warp * x.y * x.w);
        s.t0 = s.d1 == 0 ? 0.f : s.t0 / s.d1;
        step_of_warp = x.w - s.t0;
        s.d2 = sum_of_row(x.y == 0 ? 0.f : weight_of_warp * (x.z + step_of_warp * x.y));
      }
      const float factor = __shfl_sync(~0u, weight_of_warp, warp * 4 + t), step = __shfl_sync(~0u, step_of_warp, warp * 4 + t);
      const bool nothing = __shfl_sync(~0u, x.y, warp * 4 + t) == 0;
#pragma unroll
      for (int from = 0; from < VALUE_COLUMNS; from += EXCHANGE_CHANNELS) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
          if (!Tile::within(i, from, EXCHANGE_CHANNELS) || t >= QUERIES) continue;
          const float O1 = a.O1[h][n][i], O2 = a.O2[h][n][i] * a.scale[h][n] + step * O1;
          exchange[warp * EXCHANGE + (Tile::channel(i, g) - from) * QUERIES + t] =
              nothing ? make_float2(0, 0) : make_float2(factor * O1, factor * O2);
        }
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < EXCHANGE; first += THREADS) {
          const int i = first + threadIdx.x, channel = from + i / QUERIES, row = i % QUERIES;
          const Statistics of_row = {__shfl_sync(~0u, s.m, row), __shfl_sync(~0u, s.d1, row), __shfl_sync(~0u, s.d2, row),
                                     __shfl_sync(~0u, s.t0, row)};
          if (i >= EXCHANGE || channel >= VALUE_DIM) continue;
          float O1 = 0, O2 = 0;
#pragma unroll
          for (int w = 0; w < WARPS; w++) O1 += exchange[w * EXCHANGE + i].x, O2 += exchange[w * EXCHANGE + i].y;
          write(Record::number(h, n, row), channel, of_row, O1, O2);
        }
        __syncthreads();
      }
    }
}

// Counts this block among those whose parts are in memory, and returns how many were there before.
__device__ __forceinline__ unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// What a block does with its range.
__device__ __forceinline__ void attend(const Problem& p, const Maps* maps) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ unsigned arrived;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;

  Item item;
  Schedule schedule;
  if constexpr (WHOLE) {
    // Later rows see more keys and go first.
    const int items = items_of_a_batch(p);
    const int number = blockIdx.x % items, block = p.row_blocks - 1 - number % p.row_blocks;
    const int batch = blockIdx.x / items, inner = number / p.row_blocks * p.row_blocks + block;
    const Rows rows(p, Item{batch, inner});
    const Range first = keys_of_row(p, batch, rows.query(0)), last = keys_of_row(p, batch, rows.query(rows.count - 1));
    // Rows of an invalid sequence see nothing, and must not hide what the others see.
    const Range keys = PACKED && !(first.valid() && last.valid()) ? Range{0, p.kv_len} : Range{first.first, last.end};
    item = item_of(p, batch, inner, 0, keys);
    schedule.begin = 0, schedule.end = item.steps;
  } else {
    schedule = plan(p, item);
    if (schedule.begin >= schedule.end) return finish_empty_batches(p);
  }
  Ring ring;
  ring.start(p, maps, shared, item, schedule.begin, schedule.end);
  if constexpr (!WHOLE) finish_empty_batches(p);

  Accumulator a;
  Tile tile;
  int step = schedule.begin + warp;
  int begin = schedule.begin;  // of the segment: the block's steps of one item
#pragma unroll 1
  while (true) {
    const Rows rows(p, item);
    int end = min(item.begin + item.steps, schedule.end);
    if constexpr (PINNED) end = min(end, begin + p.split_steps);
    tile.load(
        shared, lane, [&](int h, int row) { return rows.at<const Element>(p.q, p.q_stride, h, row); },
        [&](int h, int row) -> const void* {
          if (PROBE == 2) return rows.at<const float>(p.r, p.r_stride, h, row);
          return rows.at<const Element>(p.r, p.r_stride, h, row);
        });
    // Where all rows see every key of a step nothing is masked; where they see the same keys nothing hidden is read.
    Range seen[TILES];
    Range by_all = item.keys, by_any = item.keys;
#pragma unroll
    for (int n = 0; n < TILES; n++) seen[n] = item.keys;
    if constexpr (VARIED) {
      by_all = {0, 0x7fffffff}, by_any = {0x7fffffff, 0};
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const int row = n * 4 + t;
        if (row >= rows.count) continue;
        seen[n] = keys_of_row(p, item.batch, rows.query(row));
        by_all = {max(by_all.first, seen[n].first), min(by_all.end, seen[n].end)};
        by_any = {min(by_any.first, seen[n].first), max(by_any.end, seen[n].end)};
      }
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        by_all.first = max(by_all.first, __shfl_xor_sync(~0u, by_all.first, mask));
        by_all.end = min(by_all.end, __shfl_xor_sync(~0u, by_all.end, mask));
        by_any.first = min(by_any.first, __shfl_xor_sync(~0u, by_any.first, mask));
        by_any.end = max(by_any.end, __shfl_xor_sync(~0u, by_any.end, mask));
      }
    }
    const bool alike = by_all.first == by_any.first && by_all.end == by_any.end;

    a.clear();
#pragma unroll 1
    for (; step < end; step += WARPS) {
      const int key = item.position(step);
      const bool masked = key < by_all.first || key + STEP > by_all.end;
      const auto sees = [&](int n, int j) { return key + j >= seen[n].first && key + j < seen[n].end; };
      float c[HEADS][TILES][4];
      tile.scores(ring.wait(), lane, c);
      ring.release(p);
#pragma unroll
      for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int n = 0; n < TILES; n++) weigh(a, h, n, c[h][n], masked, sees(n, g), sees(n, g + 8), p.scale_log2);
      char* values = ring.wait();
      bool by_row = false;
      if (masked) {
        // Rows that no one sees may hold anything, and a weight of 0 times NaN is NaN.
        constexpr int PIECES = VALUE_BYTES / 16;
#pragma unroll 1
        for (int i = lane; i < STEP * PIECES; i += 32)
          if (key + i / PIECES < by_any.first || key + i / PIECES >= by_any.end)
            *reinterpret_cast<uint4*>(values + place_of<VALUE_BYTES>(i / PIECES, i % PIECES * 16)) = make_uint4(0, 0, 0, 0);
        ring.written = true;
        __syncwarp();
        by_row = VARIED && !alike && !all_finite(values, lane);
      }
      if (VARIED && by_row)
        accumulate_visible(values, lane, c, sees, a);
      else
        Tile::accumulate(values, lane, c, a.O1, a.O2);
      ring.release(p);
    }

    const bool whole = WHOLE || (begin == item.begin && end == item.begin + item.steps);
    const int owner = WHOLE || PINNED ? 0 : schedule.owner_of(item.begin);
    // A block shares its first item and its last one with others, the rest are its own.
    const auto part_at = [&](int number) {
      const long long place = PINNED ? item.begin / p.split_steps + number
                                     : 2 * (owner + number) + (number == 0 && schedule.begin_of(owner) != item.begin);
      return Part{p.partials + place * PART_FLOATS};
    };
    const Part part = whole ? Part{nullptr} : part_at(PINNED ? (begin - item.begin) / p.split_steps : int(blockIdx.x) - owner);
    merge_warps(shared, a, lane, [&](int number, int channel, const Statistics& s, float O1, float O2) {
      const Record record(number);
      if (!whole) {
        part.sums(number)[channel] = make_float2(O1, O2);
        if (channel == 0) *part.statistics(number) = make_float4(s.m, s.d1, s.d2, s.t0);
      } else if (record.row < rows.count)
        finish(p, rows, record.h, record.row, channel, seen_by(p, item, rows, record.row), s, O1, O2);
    });
    if (!WHOLE && !whole) {
      const int parts = PINNED ? item.steps / p.split_steps : schedule.owner_of(item.begin + item.steps - 1) - owner + 1;
      unsigned* counter = p.counters + item.batch * items_of_a_batch(p) + item.inner;
      if (threadIdx.x == 0) arrived = arrive(counter);
      __syncthreads();
      if (arrived == parts - 1) {
        merge_parts(p, item, rows, parts, part_at);
        if (threadIdx.x == 0) *counter = 0;
      }
    }
    begin = end;
    if (begin >= schedule.end) break;
    advance(p, item, begin);
  }
}
