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

  // What COUNT parts, `step` apart from `first` on, hold of a row in a channel; nothing where there is no such part, or if not
  // `wanted`. By whole warps.
  template <int COUNT>
  __device__ void receive(int first, int step, int number, int channel, bool wanted, Tag tag, Statistics (&x)[COUNT], float2 (&y)[COUNT][1]) const {
    bool missing;
    delay();
    do {
      Word16 found[COUNT][3];
#pragma unroll
      for (int u = 0; u < COUNT; u++) {
        const int part = first + u * step;
#pragma unroll
        for (int i = 0; i < 3; i++) found[u][i] = {0, tag};
        if (!wanted || part >= parts) continue;
        found[u][0] = load_relaxed(sums(part, number) + channel);
        found[u][1] = load_relaxed(statistics(part, number));
        found[u][2] = load_relaxed(statistics(part, number) + 1);
      }
      missing = false;
#pragma unroll
      for (int u = 0; u < COUNT; u++) {
        const float2 weights = pair(found[u][1]), probes = pair(found[u][2]);
        y[u][0] = pair(found[u][0]);
        x[u] = {weights.x, weights.y, probes.x, probes.y};
#pragma unroll
        for (int i = 0; i < 3; i++) missing = missing || found[u][i].second != tag;
      }
      // A warp's lanes go on together.
    } while (__any_sync(~0u, missing));
  }
};

// Merges the block's slice of the item, in the order of its parts, and writes it. A unit is a channel of a row; as many lanes
// share one as there are parts for, and threads.
__device__ __forceinline__ void merge_parcels(const Problem& p, const Parcels& parcels, const Item& item, const Rows& rows, Tag tag) {
  constexpr int AT_ONCE = 8, UNITS = RECORDS * VALUE_DIM;
  const int slice = (UNITS + parcels.parts - 1) / parcels.parts;
  int team = 1;
#pragma unroll 1
  while (team < 32 && AT_ONCE * team < parcels.parts && 2 * team * slice <= THREADS) team *= 2;
  const int member = threadIdx.x % team;
#pragma unroll 1
  for (int first = 0; first < slice; first += THREADS / team) {
    const int number_in_slice = first + threadIdx.x / team, unit = parcels.own * slice + number_in_slice;
    const bool wanted = number_in_slice < slice && unit < UNITS;
    const int number = unit / VALUE_DIM, channel = unit % VALUE_DIM;
    RowState<1> state;
    state.clear();
#pragma unroll 1
    for (int part = 0; part < parcels.parts; part += AT_ONCE * team) {
      Statistics x[AT_ONCE];
      float2 y[AT_ONCE][1];
      parcels.receive(part + member, team, number, channel, wanted, tag, x, y);
      state.add(x, y);
    }
#pragma unroll 1
    for (int distance = team / 2; distance > 0; distance /= 2) {
      const Statistics& s = state.s;
      const auto of_other = [&](float x) { return __shfl_xor_sync(~0u, x, distance); };
      const Statistics x[1] = {{of_other(s.m), of_other(s.d1), of_other(s.d2), of_other(s.t0)}};
      const float2 y[1][1] = {{make_float2(of_other(state.O1[0]), of_other(state.O2[0]))}};
      state.add(x, y);
    }
    const Record record(number);
    if (wanted && member == 0 && record.row < rows.count) finish(p, rows, record, channel, seen_by(p, item, rows, record.row), state);
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
