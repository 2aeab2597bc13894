#pragma once
// Blocks that share an item and run at once: each sends what it has of the item, and merges a slice of it when its own keys
// are read.
//
// A word is two numbers and a tag, and is there when its tag is: no fence is waited for, no counter, and not for a last block
// that merges all. A tag holds the item's number and how often that was used, so that no launch ever had the same one, whatever
// its kernel left in this memory.

#include "delay.cuh"
#include "merge.cuh"
#include "ptx/copy.cuh"
#include "ptx/relaxed.cuh"

typedef unsigned long long Tag;

struct Parcels {
  static constexpr int WORDS = RECORDS * (2 + VALUE_DIM);  // of a block: statistics of its rows, then their sums

  Tag* uses;
  Word16* words;
  int item, parts, own;
  int first, others, apart;  // places of the first part and, `apart` from one another, of the others

  Parcels() = default;

  // Of an item whose part `k` lies at the place `first` or, if it is another, at `others + k * apart`.
  __device__ Parcels(const Problem& p, int item, int parts, int own, int first, int others, int apart)
      : item(item), parts(parts), own(own), first(first), others(others), apart(apart) {
    uses = reinterpret_cast<Tag*>(p.partials) + item;
    words = reinterpret_cast<Word16*>(reinterpret_cast<Tag*>(p.partials) + MOST_ITEMS);
  }

  // Of a grid whose blocks along x share an item.
  __device__ static Parcels of_grid(const Problem& p) {
    const int item = blockIdx.z * gridDim.y + blockIdx.y, parts = gridDim.x;
    return Parcels(p, item, parts, blockIdx.x, item * parts, item * parts, 1);
  }

  // By one thread, before the item's blocks send anything: how often it was used comes to shared memory, on its way while
  // keys are read.
  __device__ static void ask_uses(const Problem& p, int item, Word16* to) {
    copy_16(shared_address(to), reinterpret_cast<const Tag*>(p.partials) + item / 2 * 2);
    copy_commit();
  }
  __device__ Tag first_tag(const Word16* uses) const {
    copy_wait<0>();
    return ((item % 2 ? uses->second : uses->first) + 1) * MOST_ITEMS + item;
  }

  // By a thread of one block, when it has what all others sent.
  __device__ void count_use(Tag tag) const { store_relaxed(uses, tag / MOST_ITEMS); }

  __device__ Word16* at(int part) const {
    const int place = SINGLE ? first + part : part == 0 ? first : others + part * apart;
    return words + unsigned(place * WORDS);
  }
  __device__ Word16* statistics(int part, int number) const { return at(part) + number * 2; }
  __device__ Word16* sums(int part, int number) const { return at(part) + RECORDS * 2 + number * VALUE_DIM; }

  __device__ static Word16 word(float x, float y, Tag tag) {
    return {static_cast<Tag>(__float_as_uint(y)) << 32 | __float_as_uint(x), tag};
  }
  __device__ static float2 pair(const Word16& word) {
    return make_float2(__uint_as_float(static_cast<unsigned>(word.first)), __uint_as_float(static_cast<unsigned>(word.first >> 32)));
  }

  __device__ void send(int number, int channel, const RowState<1>& state, Tag tag) const {
    store_relaxed(sums(own, number) + channel, word(state.O1[0], state.O2[0], tag));
    if (channel) return;
    store_relaxed(statistics(own, number), word(state.s.m, state.s.d1, tag));
    store_relaxed(statistics(own, number) + 1, word(state.s.d2, state.s.t0, tag));
  }
};

// Words that others send, asked for until all are there; by whole warps, whose lanes go on together.
template <int COUNT, class At>
__device__ __forceinline__ void receive(Word16 (&found)[COUNT], Tag tag, At at) {
  bool missing;
  delay();
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const Word16* from = at(i);
      found[i] = from ? load_relaxed(from) : Word16{0, tag};
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) missing = missing || found[i].second != tag;
  } while (__any_sync(~0u, missing));
}

// Merges the block's slice of the item, in an order that is always the same, and writes it. A warp takes channels of one row, in each
// of which several lanes take parts in turn, so that all warps have something to do; and every lane finds what one part weighs.
__device__ __forceinline__ void merge_parcels(const Problem& p, const Parcels& parcels, const Item& item, const Rows& rows, Tag tag) {
  constexpr int AT_ONCE = 8, UNITS = RECORDS * VALUE_DIM;
  static_assert(!TOGETHER || VALUE_DIM % 32 == 0, "a warp's channels are of one row");
  int slice = WARPS;
#pragma unroll 1
  while (slice < THREADS && slice * parcels.parts < UNITS) slice *= 2;
  if (slice * parcels.parts < UNITS) slice = round_up((UNITS + parcels.parts - 1) / parcels.parts, THREADS);
  const int width = min(32, slice / WARPS), members = 32 / width;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), member = lane / width;
#pragma unroll 1
  for (int first = warp * width; first < slice; first += WARPS * width) {
    const int unit = parcels.own * slice + first;
    if (unit >= UNITS) break;
    const int number = unit / VALUE_DIM, channel = unit % VALUE_DIM + lane % width;
    const Destination destination(p, item, rows, Record(number));
    RowState<1> state;
    state.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < parcels.parts; chunk += 32) {
      const int count = min(32, parcels.parts - chunk);
      // The statistics of the lane's part, and the first sums that it takes.
      Word16 found[2 + AT_ONCE];
      receive(found, tag, [&](int i) -> const Word16* {
        if (i < 2) return lane < count ? parcels.statistics(chunk + lane, number) + i : nullptr;
        const int part = (i - 2) * members + member;
        return part < count ? parcels.sums(chunk + part, number) + channel : nullptr;
      });
      const float2 weights = Parcels::pair(found[0]), probes = Parcels::pair(found[1]);
      const Statistics x = lane < count ? Statistics{weights.x, weights.y, probes.x, probes.y} : Statistics::none();
      const unsigned seen = __ballot_sync(~0u, !x.saw_nothing());
      float m = x.saw_nothing() ? minus_infinity() : x.m;
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, mask));
      m = fmaxf(m, state.s.m);
      // The first state that saw a key gives the shift, all others move to it.
      const float t0 = __shfl_sync(~0u, x.t0, seen ? __ffs(seen) - 1 : 0);
      if (state.s.saw_nothing() && seen) state.s.t0 = t0;
      const float factor = x.saw_nothing() ? 0.f : weight(x.m, m), step = x.saw_nothing() ? 0.f : x.t0 - state.s.t0;
      float d1 = factor * x.d1, d2 = x.saw_nothing() ? 0.f : factor * (x.d2 + step * x.d1);
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) d1 += __shfl_xor_sync(~0u, d1, mask), d2 += __shfl_xor_sync(~0u, d2, mask);
      const float own = state.s.saw_nothing() ? 0.f : weight(state.s.m, m);
      state.s = {m, own * state.s.d1 + d1, own * state.s.d2 + d2, state.s.t0};
      state.O1[0] *= own, state.O2[0] *= own;
#pragma unroll 1
      for (int begin = 0; begin < count; begin += AT_ONCE * members) {
        if (begin > 0) {
          Word16 more[AT_ONCE];
          receive(more, tag, [&](int i) -> const Word16* {
            const int part = begin + i * members + member;
            return part < count ? parcels.sums(chunk + part, number) + channel : nullptr;
          });
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) found[2 + i] = more[i];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int part = begin + i * members + member;
          const float of_part = __shfl_sync(~0u, factor, part % 32), step_of_part = __shfl_sync(~0u, step, part % 32);
          // Sums of nothing but weights of 0 may be NaN.
          const float2 y = part < count && (seen >> part % 32 & 1) ? Parcels::pair(found[2 + i]) : make_float2(0, 0);
          state.O1[0] += of_part * y.x, state.O2[0] += of_part * (y.y + step_of_part * y.x);
        }
      }
    }
#pragma unroll 1
    for (int lanes = width; lanes < 32; lanes *= 2) {
      state.O1[0] += __shfl_xor_sync(~0u, state.O1[0], lanes);
      state.O2[0] += __shfl_xor_sync(~0u, state.O2[0], lanes);
    }
    if (member == 0) finish(p, destination, channel, state);
  }
  if (parcels.own == 0 && threadIdx.x == 0) parcels.count_use(tag);
}

// The items that a block has sent its parts of, and is to merge its slices of: the first of its range and the last.
struct Owed {
  struct {
    Item item;
    Parcels parcels;
    Tag tag;
  } items[2];
};
