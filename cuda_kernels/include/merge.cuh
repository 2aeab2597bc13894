#pragma once
// From the states of warps, of a cluster's blocks and of all blocks to the output of a row.

#include "block_meeting.cuh"
#include "ptx/atomics.cuh"
#include "ptx/cached.cuh"
#include "ptx/cluster.cuh"
#include "ptx/opaque.cuh"
#include "ptx/shared_memory.cuh"
#include "row_state.cuh"
#include "rows.cuh"

// The thread's number, of which the compiler does not know that it is less than there are threads.
__device__ __forceinline__ int thread_of_block() {
  __builtin_assume(threadIdx.x < THREADS);
  return threadIdx.x;
}

__device__ __forceinline__ void store(Element* to, float x) {
  if constexpr (FLOAT)
    *to = x;
  else
    *to = narrow<BFLOAT>(x);
}

// What a row of an item sees.
__device__ __forceinline__ Range seen_by(const Problem& p, const Item& item, const Rows& rows, int row) {
  return VARIED ? keys_of_row(p, item.batch, rows.query(row)) : item.keys;
}

// Where a row's output goes: found before there is anything to write, which then need not wait for it.
struct Destination {
  Element* out;      // of channel 0
  long long number;  // of the row
  Range seen;
  bool exists;

  Destination() = default;
  __device__ __forceinline__ Destination(const Problem& p, const Item& item, const Rows& rows, const Record& record)
      : number(rows.number(record.h, record.row)), exists(record.row < rows.count) {
    out = rows.at<Element>(p.out, p.out_stride, record.h, record.row);
    if (exists) seen = seen_by(p, item, rows, record.row);
  }
};

// The row's output in WIDTH channels, and its state where that is asked for.
template <int WIDTH>
__device__ __forceinline__ void finish(const Problem& p, const Destination& to, int channel, const RowState<WIDTH>& state) {
  if (!to.exists) return;
  const Range& seen = to.seen;
  Statistics s = state.s;
  // Scores that are all -inf have no softmax.
  if (!seen.valid() || (!seen.empty() && s.saw_nothing())) s.d1 = quiet_nan();
  const float inverse = reciprocal_fast(s.d1), c = PROBE ? s.d2 * inverse : 0.f;
  const bool is_zero = seen.valid() && seen.empty();
#pragma unroll
  for (int e = 0; e < WIDTH; e++) {
    float o = state.O1[e] * inverse;
    if constexpr (PROBE) o = (1 + c) * o - state.O2[e] * inverse;
    if (p.out) store(to.out + channel + e, is_zero ? 0.f : o);
    if (!p.m) continue;
    p.O1[to.number * VALUE_DIM + channel + e] = state.O1[e];
    if constexpr (PROBE) p.O2[to.number * VALUE_DIM + channel + e] = state.O2[e];
  }
  if (p.m && channel == 0) {
    p.m[to.number] = s.m * 0.693147180559945f;
    p.d1[to.number] = s.d1;
    if constexpr (PROBE) p.d2[to.number] = s.d2, p.t0[to.number] = s.t0;
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
      const Item item = item_of(p, batch, inner / p.row_blocks, inner % p.row_blocks, 0, keys);
      const Rows rows(p, item);
#pragma unroll 1
      for (int i = threadIdx.x; i < RECORDS * VALUE_DIM; i += THREADS)
        finish(p, Destination(p, item, rows, Record(i / VALUE_DIM)), i % VALUE_DIM, nothing);
    }
  }
}

// A part of an item in the workspace, or what a block of a cluster merges of it: statistics of RECORDS rows, then
// their pairs (O1, O2).
struct Part {
  static constexpr int ROW = round_up(2 * SLICE, 4);
  static constexpr int FLOATS = RECORDS * (4 + ROW);
  float* base;
  __device__ float4* statistics(int record) const { return reinterpret_cast<float4*>(base) + record; }
  __device__ float2* sums(int record) const { return reinterpret_cast<float2*>(base + RECORDS * 4 + record * ROW); }
};

// What a thread of the last block merges at a time: WIDTH channels of a row over every TEAMS-th part. The latency of the second-level
// cache is all there is to wait for, and should be waited for once.
struct Merged {
  static constexpr int WIDTH = SLICE % 2 ? 1 : SLICE % 4 == 0 && RECORDS * SLICE >= 4 * THREADS ? 4 : 2, UNITS = RECORDS * SLICE / WIDTH;
  static constexpr int TEAMS = UNITS >= THREADS ? 1 : (THREADS / UNITS < 4 ? THREADS / UNITS : 4), UNROLL = TEAMS == 1 && WIDTH < 4 ? 8 : 4;
  static constexpr bool AT_ONCE = UNITS * TEAMS <= THREADS;  // whether that is all
  int team, number, channel;

  __device__ explicit Merged(int place)
      : team(TEAMS == 1 ? 0 : place / UNITS), number(place % UNITS * WIDTH / SLICE), channel(place % UNITS * WIDTH % SLICE) {}
};

// A thread's row and channels of a part.
struct Found {
  const float4* statistics;
  const float2* sums;

  Found() = default;
  __device__ Found(const Part& part, const Merged& at) : statistics(part.statistics(at.number)), sums(part.sums(at.number) + at.channel) {}
};

// The parts of an item of a grid whose blocks along x share it. Where they lie is found before any key is there: at the end of a block
// each instruction is waited for.
struct PartsOfGrid {
  static constexpr int APART = CLUSTER * Part::FLOATS;
  Part own;
  float* first;
  Found found;  // of the first part that the thread merges

  PartsOfGrid() = default;
  __device__ PartsOfGrid(const Problem& p, int rank) {
    const int parts = gridDim.x / CLUSTER;
    first = p.partials + (1ll * (blockIdx.z * gridDim.y + blockIdx.y) * parts * CLUSTER + rank) * Part::FLOATS;
    own = (*this)(blockIdx.x / CLUSTER);
    const Merged at(threadIdx.x);
    found = Found((*this)(at.team), at);
    make_opaque(first), make_opaque(own.base), make_opaque(found.statistics), make_opaque(found.sums);
  }
  __device__ Part operator()(int number) const { return {first + number * APART}; }
};

// A thread's way from part to part.
template <class PartAt>
struct Walk {
  const PartAt& part_at;
  Merged at;
  int number;

  __device__ Walk(const PartAt& part_at, const Merged& at) : part_at(part_at), at(at), number(at.team) {}
  __device__ Found ahead(int turns) const { return Found(part_at(number + turns * Merged::TEAMS), at); }
  __device__ void go_on(int turns) { number += turns * Merged::TEAMS; }
};
template <>
struct Walk<PartsOfGrid> {
  static constexpr int TURN = Merged::TEAMS * PartsOfGrid::APART;  // in floats
  Found found;

  __device__ Walk(const PartsOfGrid& parts, const Merged& at) : found(Merged::AT_ONCE ? parts.found : Found(parts(at.team), at)) {}
  __device__ Found ahead(int turns) const {
    Found x = found;
    x.statistics += turns * TURN / 4, x.sums += turns * TURN / 2;
    return x;
  }
  __device__ void go_on(int turns) { found = ahead(turns); }
};

// Nothing that is derived from it is found earlier.
__device__ __forceinline__ Item copy_opaque(Item item) {
  unsigned numbers[3] = {unsigned(item.batch), unsigned(item.unit), unsigned(item.block)};
#pragma unroll
  for (int i = 0; i < 3; i++) make_opaque(numbers[i]);
  item.batch = numbers[0], item.unit = numbers[1], item.block = numbers[2];
  return item;
}

// Merges the parts of an item in their order and writes its rows, from channel `from` on.
template <class PartAt>
__device__ __forceinline__ void merge_parts(const Problem& p, const Item& item, char* shared, BlockMeeting& meet_block, int from,
                                            int parts, const PartAt& part_at) {
  constexpr int WIDTH = Merged::WIDTH, UNITS = Merged::UNITS, TEAMS = Merged::TEAMS, UNROLL = Merged::UNROLL;
#pragma unroll 1
  for (int first = 0; first < UNITS * TEAMS; first += THREADS) {
    const int place = first + thread_of_block();
    const Merged at(place);
    Walk<PartAt> walk(part_at, at);
    Destination destination;
    RowState<WIDTH> state;
    state.clear();
    // Those from part `begin` on; first: whether it is known that there were none before.
    const auto take = [&](int begin, bool first) {
      Statistics x[UNROLL];
      float2 sums[UNROLL][WIDTH];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const Found part = walk.ahead(u);
        const bool exists = begin + u * TEAMS < parts;
        x[u] = Statistics::of(load_cached_if(exists, part.statistics));
        if constexpr (WIDTH == 1) sums[u][0] = load_cached_if(exists, part.sums);
#pragma unroll
        for (int e = 0; e < WIDTH / 2 * 2; e += 2) {
          const float4 y = load_cached_if(exists, reinterpret_cast<const float4*>(part.sums + e));
          sums[u][e] = make_float2(y.x, y.y), sums[u][e + 1] = make_float2(y.z, y.w);
        }
      }
      // While they are on their way, and not before.
      if (first || (!SINGLE && begin == at.team)) {
        const Item here = copy_opaque(item);
        destination = Destination(p, here, Rows(p, here), Record(at.number));
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) x[u].d1 = begin + u * TEAMS < parts ? x[u].d1 : 0.f;
      state.add(x, sums, first);
    };
    if (place < UNITS * TEAMS) {
      int begin = at.team;
      // Where registers allow, by instructions of their own, of which none is in vain.
      if constexpr (SINGLE) take(begin, true), begin += TEAMS * UNROLL, walk.go_on(UNROLL);
#pragma unroll 1
      for (; begin < parts; begin += TEAMS * UNROLL, walk.go_on(UNROLL)) take(begin, false);
    }
    if constexpr (TEAMS > 1) {
      float4* statistics = reinterpret_cast<float4*>(shared + EXCHANGE_AT);
      float2* sums = reinterpret_cast<float2*>(statistics + THREADS);
      statistics[threadIdx.x] = state.s.packed();
#pragma unroll
      for (int e = 0; e < WIDTH; e++) sums[threadIdx.x * WIDTH + e] = make_float2(state.O1[e], state.O2[e]);
      meet_block();
      if (threadIdx.x < UNITS) {
        constexpr int OTHERS = TEAMS > 1 ? TEAMS - 1 : 1;
        Statistics x[OTHERS];
        float2 y[OTHERS][WIDTH];
#pragma unroll
        for (int other = 1; other <= OTHERS; other++) {
          x[other - 1] = Statistics::of(statistics[threadIdx.x + other * UNITS]);
#pragma unroll
          for (int e = 0; e < WIDTH; e++) y[other - 1][e] = sums[(threadIdx.x + other * UNITS) * WIDTH + e];
        }
        state.add(x, y);
      }
    }
    if (place < UNITS) finish(p, destination, from + at.channel, state);
  }
  if constexpr (!SINGLE) meet_block();  // before the shared memory is used again
}

// The sums that the warps left in the exchange become one, of which write(record number, channel, state) gets every
// row's channels from `from` on.
template <class At, class Write>
__device__ __forceinline__ void merge_warps(const char* shared, int from, Write write) {
  // The rows of a channel follow one another, as the lanes that wrote them do; two of them are loaded at a time. A thread
  // has the same two of all its channels where the groups of rows divide the threads: their factors are loaded once.
  constexpr int PAIR = QUERIES > 1 ? 2 : 1, GROUPS = RECORDS / QUERIES;
  constexpr int TEAMS = WARPS % GROUPS == 0 ? GROUPS : 1, TEAM = THREADS / TEAMS, EACH = QUERIES * At::COPIES;
#pragma unroll 1
  for (int group = thread_of_block() / TEAM; group < GROUPS; group += TEAMS) {
    const int number = group * QUERIES + threadIdx.x * PAIR % QUERIES;
    float2 factors[PAIR][RINGS];
    Statistics totals[PAIR];
#pragma unroll
    for (int e = 0; e < PAIR; e++) {
      totals[e] = Statistics::of(reinterpret_cast<const float4*>(shared + TOTALS_AT)[number + e]);
#pragma unroll
      for (int w = 0; w < RINGS; w++)
        factors[e][w] = reinterpret_cast<const float2*>(shared + FACTORS_AT)[(number + e) * WARPS + w * STEP_WARPS];
    }
#pragma unroll 1
    for (int first = threadIdx.x % TEAM * PAIR; first < At::CHANNELS * QUERIES; first += TEAM * PAIR) {
      const int channel = from + first / QUERIES;
      if (channel >= VALUE_DIM) continue;
      RowState<1> state[PAIR];
#pragma unroll
      for (int e = 0; e < PAIR; e++) state[e].s = totals[e], state[e].O1[0] = state[e].O2[0] = 0;
#pragma unroll
      for (int w = 0; w < RINGS; w++) {
        const float2* exchange = reinterpret_cast<const float2*>(shared + At::AT + w * At::PITCH) +
                                 (group * At::CHANNELS + first / QUERIES) * EACH + first % QUERIES;
        float2 sums[PAIR];
        if constexpr (EACH == 1) {
          sums[0] = *exchange;
        } else {
          const float4 x = *reinterpret_cast<const float4*>(exchange);
          sums[0] = make_float2(x.x, x.y);
          if constexpr (PAIR == 2) sums[PAIR - 1] = make_float2(x.z, x.w);
          // Of rests, which stand beside: for one row in the same vector.
          if constexpr (EACH == 2 * QUERIES) {
            const float4 y = PAIR == 1 ? make_float4(x.z, x.w, 0, 0) : *reinterpret_cast<const float4*>(exchange + QUERIES);
            sums[0].x += y.x, sums[0].y += y.y;
            if constexpr (PAIR == 2) sums[PAIR - 1].x += y.z, sums[PAIR - 1].y += y.w;
          }
        }
#pragma unroll
        for (int e = 0; e < PAIR; e++) {
          const float2 factor = factors[e][w];
          state[e].O1[0] += factor.x * sums[e].x, state[e].O2[0] += factor.x * (sums[e].y + factor.y * sums[e].x);
        }
      }
#pragma unroll
      for (int e = 0; e < PAIR; e++) write(number + e, channel, state[e]);
    }
  }
}

// The states of a cluster's blocks become one; write(record number, channel within the block's slice, state) gets
// the block's channels, WIDTH at a time.
template <class Write>
__device__ __forceinline__ void merge_cluster(char* shared, int rank, Write write) {
  constexpr int WIDTH = SLICE % 2 ? 1 : 2, UNITS = RECORDS * SLICE / WIDTH;
  const unsigned result = shared_address(shared + RESULT_AT);
  struct {
    Statistics x;
    float2 sums[WIDTH];
  } next;
  const auto load = [&](int i) {
    next = {Statistics::none(), {}};
    if (i >= UNITS * CLUSTER) return;
    const int number = i / CLUSTER * WIDTH / SLICE, channel = i / CLUSTER * WIDTH % SLICE;
    const unsigned there = cluster_address(result, i % CLUSTER);
    next.x = Statistics::of(cluster_load4(there + number * 16));
    const unsigned place = there + RECORDS * 16 + (number * VALUE_DIM + rank * SLICE + channel) * 8;
    if constexpr (WIDTH == 2) {
      const float4 y = cluster_load4(place);
      next.sums[0] = make_float2(y.x, y.y), next.sums[WIDTH - 1] = make_float2(y.z, y.w);
    } else
      next.sums[0] = cluster_load2(place);
  };
  load(threadIdx.x);
#pragma unroll 1
  for (int first = 0; first < UNITS * CLUSTER; first += THREADS) {
    const int i = first + threadIdx.x, source = i % CLUSTER, unit = i / CLUSTER * WIDTH;
    const int number = unit / SLICE, channel = unit % SLICE;
    const Statistics x = next.x;
    float2 sums[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) sums[e] = next.sums[e];
    // On its way while this one is merged.
    if constexpr (UNITS * CLUSTER > THREADS) load(i + THREADS);
    const unsigned peers = ((1u << CLUSTER) - 1) << (threadIdx.x % 32 / CLUSTER * CLUSTER);
    const unsigned seen = __ballot_sync(~0u, !x.saw_nothing()) & peers;
    RowState<WIDTH> state;
    state.clear();
    state.s.t0 = __shfl_sync(~0u, x.t0, seen ? __ffs(seen) - 1 : 0);
    state.s.m = x.saw_nothing() ? minus_infinity() : x.m;
#pragma unroll
    for (int mask = 1; mask < CLUSTER; mask *= 2) state.s.m = fmaxf(state.s.m, __shfl_xor_sync(~0u, state.s.m, mask));
    if (!x.saw_nothing()) {
      const float factor = weight(x.m, state.s.m), step = x.t0 - state.s.t0;
      state.s.d1 = factor * x.d1, state.s.d2 = factor * (x.d2 + step * x.d1);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) state.O1[e] = factor * sums[e].x, state.O2[e] = factor * (sums[e].y + step * sums[e].x);
    }
#pragma unroll
    for (int mask = 1; mask < CLUSTER; mask *= 2) {
      state.s.d1 += __shfl_xor_sync(~0u, state.s.d1, mask);
      state.s.d2 += __shfl_xor_sync(~0u, state.s.d2, mask);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) {
        state.O1[e] += __shfl_xor_sync(~0u, state.O1[e], mask);
        state.O2[e] += __shfl_xor_sync(~0u, state.O2[e], mask);
      }
    }
    if (source == 0 && i < UNITS * CLUSTER) write(number, channel, state);
  }
}
