#pragma once
// The tiled loop over keys of softmax and Parallax attention, and of LLA once its probe is solved.
//
// A block takes a range of steps (schedule.cuh); its warps, or with many query rows its warpgroups, take the steps in turn, each
// with a ring of its own, and meet where the range leaves an item. What a block has seen of an item that it shares with others
// goes to the workspace; the last block to arrive there merges all parts in their order and writes the output. Or all run at
// once, and each merges slices when it has read its keys (parcels.cuh).

#include "merge.cuh"
#include "parcels.cuh"
#include "ptx/dependents.cuh"
#include "queries.cuh"
#include "warp_weights.cuh"
#if WARPGROUPS
#include "warpgroup_steps.cuh"
#else
#include "warp_steps.cuh"
#endif

// Leaves the warp's sums in the channels from `from` on that there is room for, for merge_warps.
template <class At>
__device__ __forceinline__ void hand_over(char* shared, Accumulator& a, int lane, int from) {
  const int warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float2* exchange = reinterpret_cast<float2*>(shared + At::AT + warp / STEP_WARPS * At::PITCH);
#pragma unroll
  for (int h = 0; h < HEADS; h++)
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      if (RESTS_ASIDE && At::COPIES == 1 && from == 0) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
          a.O1[h][n][i] += __shfl_xor_sync(~0u, a.O1[h][n][i], QUERIES);
          a.O2[h][n][i] += __shfl_xor_sync(~0u, a.O2[h][n][i], QUERIES);
        }
      }
      if (t >= QUERIES * At::COPIES) continue;
      const float unit = BFLOAT || FLOAT ? 1.f : a.scale[h][n];
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) {
        const int channel = Tile::channel(i, g) - from;
        if (At::CHANNELS < VALUE_COLUMNS && (channel < 0 || channel >= At::CHANNELS)) continue;
        exchange[((h * TILES + n) * At::CHANNELS + channel) * QUERIES * At::COPIES + t] = make_float2(a.O1[h][n][i], a.O2[h][n][i] * unit);
      }
    }
}

// What a block does with its range.
__device__ __forceinline__ void attend(const Problem& p, const Maps* maps) {
  extern __shared__ __align__(BOXES ? 1024 : 16) char shared[];
  __shared__ Tag tag;
  __shared__ Owed owed;
  __shared__ unsigned long long synced;
  __shared__ unsigned long long told;
  __shared__ Word16 uses;  // of the item's parcels
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;

  if constexpr (BOXES) {
    if (threadIdx.x == 0) prefetch_map(maps->k), prefetch_map(maps->v);
  }
  BlockMeeting meet_block(synced, THREADS);
  WarpsTold warps_told(told);
  Ring ring;
  const auto prepare = [&] {
    ring.prepare(maps, shared);
    // Nothing before has touched global memory.
    wait_for_launch_ahead();
  };
  // Where the arguments alone say which keys a block has, what they say is read meanwhile.
  constexpr bool BY_ARGUMENTS = GRID == 1 && !INDEXED;
  if constexpr (!BY_ARGUMENTS) prepare();
  Item item;
  Schedule schedule;
  if constexpr (GRID == 0) {
    schedule = plan(p, item);
    if (schedule.begin >= schedule.end) return finish_empty_batches(p);
  } else if constexpr (GRID == 1) {
    const int unit = p.row_blocks == 1 ? blockIdx.y : blockIdx.y / p.row_blocks;
    item = item_of(p, blockIdx.z, unit, blockIdx.y - unit * p.row_blocks, 0, keys_of_batch(p, blockIdx.z));
    const int cut = blockIdx.x;
    // Where lengths are on the device, so is how many steps a cut has.
    const int share = INDEXED ? unsigned(item.steps) / gridDim.x : p.share, surplus = INDEXED ? item.steps - share * gridDim.x : p.surplus;
    schedule.begin = cut * share + min(cut, surplus), schedule.end = schedule.begin + share + (cut < surplus);
  } else {
    // Later rows see more keys and go first.
    const int number = blockIdx.x / p.row_blocks, block = p.row_blocks - 1 - blockIdx.x % p.row_blocks;
    const int batch = number / units_of_a_batch(p), unit = number % units_of_a_batch(p);
    const Rows rows(p, Item{batch, unit, block});
    const Range first = keys_of_row(p, batch, rows.query(0)), last = keys_of_row(p, batch, rows.query(rows.count - 1));
    // Rows of an invalid sequence see nothing, and must not hide what the others see.
    const Range keys = PACKED && !(first.valid() && last.valid()) ? Range{0, p.kv_len} : Range{first.first, last.end};
    item = item_of(p, batch, unit, block, 0, keys);
    schedule.begin = 0, schedule.end = item.steps;
  }
  if constexpr (BY_ARGUMENTS) prepare();
  ring.start(p, item, schedule.begin, schedule.end);
  // Before the streams of keys, behind which it would wait. Of few rows few warps have a part in it.
  Queries queries;
  queries.fetch(p, Rows(p, item));
  const auto number_of = [&](const Item& item) { return (item.batch * units_of_a_batch(p) + item.unit) * p.row_blocks + item.block; };
  if (TOGETHER && threadIdx.x == 0) Parcels::ask_uses(p, number_of(item), &uses);
  ring.fill_up(p);
  if constexpr (GRID == 0) finish_empty_batches(p);
  Element* query_place = reinterpret_cast<Element*>(shared + QUERIES_AT);
  // Rows and columns that no query is written to are read all the same, unless rests stand there.
  if constexpr ((RECORDS < HEADS * ROWS && !RESTS_ASIDE) || HEAD_DIM < KEY_COLUMNS || (WARPGROUPS && PROBE != 1)) {
    Queries::clear(query_place);
    meet_block();
  }

  Accumulator a;
  Tile tile;
  int step = schedule.begin + warp / STEP_WARPS;
  int begin = schedule.begin;  // of the segment: the block's steps of one item
  int owing = 0;
#pragma unroll 1
  while (true) {
    const Rows rows(p, item);
    int end = SINGLE ? schedule.end : min(item.begin + item.steps, schedule.end);
    if constexpr (GRID == 0 && PINNED) end = min(end, begin + p.split_steps);
    queries.deposit(query_place);
    if (WARPGROUPS) fence_async_proxy();
    meet_block();
    tile.load(query_place, lane);
    Item next = item;
    if (!SINGLE && end < schedule.end) {
      advance(p, next, end);
      queries.fetch(p, Rows(p, next));
    }
    a.clear();
    if constexpr (PINNED) step = begin + warp;
    // Whose parts make up the item, and which of them this block's is: found out here, where keys are waited for, if it can be.
    constexpr bool CUT_ALIKE = GRID == 1 && !TOGETHER;
    int parts = 1, own = 0, owner = 0;
    unsigned* counter = p.counters;
    if constexpr (GRID == 1) {
      parts = gridDim.x / CLUSTER;
      counter += (blockIdx.z * gridDim.y + blockIdx.y) * CLUSTER + rank;
      make_opaque(counter);
    }
    PartsOfGrid parts_of_grid;
    if constexpr (CUT_ALIKE) parts_of_grid = PartsOfGrid(p, rank);
    take_steps(p, item, rows, ring, tile, a, step, end, warps_told, shared, lane);

    if (SINGLE || end >= schedule.end) let_next_launch_begin();
    if constexpr (GRID == 0) {
      counter += number_of(item);
      if (PINNED)
        parts = item.steps / p.split_steps, own = (begin - item.begin) / p.split_steps;
      else if (begin != item.begin || end != item.begin + item.steps) {
        owner = schedule.owner_of(item.begin);
        parts = schedule.owner_of(item.begin + item.steps - 1) - owner + 1, own = int(blockIdx.x) - owner;
      }
    }
    // A block shares its first item and its last one with others, the rest are its own.
    const int first_place = 2 * owner + (GRID == 0 && !PINNED && schedule.begin_of(owner) != item.begin);
    const auto part_at = [&](int number) {
      long long place;
      if (PINNED)
        place = item.begin / p.split_steps + number;
      else
        place = number == 0 ? first_place : 2 * (owner + number);
      return Part{p.partials + place * Part::FLOATS};
    };
    const Part part = CUT_ALIKE ? parts_of_grid.own : part_at(own);
    const Parcels parcels = SINGLE ? Parcels::of_grid(p) : Parcels(p, number_of(item), parts, own, first_place, 2 * owner, 2);
    if (TOGETHER && threadIdx.x == 0) tag = parcels.first_tag(&uses);
    // The block's, or the cluster's, state of a row in a channel of its slice.
    const auto write = [&](int number, int channel, const auto& state) {
      if (TOGETHER && (SINGLE || parts > 1)) {
        if constexpr (TOGETHER) parcels.send(number, channel, state, tag);
      } else if (!WHOLE && parts > 1) {
        constexpr int WIDTH = sizeof(state.O1) / sizeof(float);
        if constexpr (WIDTH == 2)
          *reinterpret_cast<float4*>(part.sums(number) + channel) = make_float4(state.O1[0], state.O2[0], state.O1[WIDTH - 1], state.O2[WIDTH - 1]);
        else
          part.sums(number)[channel] = make_float2(state.O1[0], state.O2[0]);
        if (channel == 0) *part.statistics(number) = state.s.packed();
      } else {
        // Found here: where a block has an item's part, it has no use for it.
        const Item here = copy_opaque(item);
        finish(p, Destination(p, here, Rows(p, here), Record(number)), rank * SLICE + channel, state);
      }
    };
    const auto merge_block = [&](auto at) {
      typedef decltype(at) At;
#pragma unroll
      for (int from = 0; from < VALUE_DIM; from += At::CHANNELS) {
        // Warps of short rows end together; of others the first ones have time for it while the last still take their keys.
        if (CLUSTER > 1 && from == 0) warps_told.weigh(shared, a, meet_block, lane);
        hand_over<At>(shared, a, lane, from);
        if (CLUSTER == 1 && from == 0) warps_told.weigh(shared, a, meet_block, lane);
        meet_block();
        if constexpr (CLUSTER > 1) {
          merge_warps<At>(shared, from, [&](int number, int channel, const RowState<1>& state) {
            reinterpret_cast<float2*>(shared + RESULT_AT + RECORDS * 16)[number * VALUE_DIM + channel] = make_float2(state.O1[0], state.O2[0]);
            if (channel == 0) reinterpret_cast<float4*>(shared + RESULT_AT)[number] = state.s.packed();
          });
        } else {
          merge_warps<At>(shared, from, write);
        }
        if (!SINGLE || from + At::CHANNELS < VALUE_DIM) meet_block();
      }
    };
    if (LAST_IN_RINGS && (SINGLE || end >= schedule.end))
      merge_block(Exchange<LAST_IN_RINGS>());
    else if constexpr (!SINGLE)
      merge_block(Exchange<false>());
    if constexpr (CLUSTER > 1) {
      cluster_arrive_shared();
      cluster_wait();
      merge_cluster(shared, rank, write);
      cluster_arrive_relaxed();  // no block may leave before the others have read what it left
    }
    if constexpr (TOGETHER && SINGLE) {
      merge_parcels(p, parcels, item, rows, tag);
    } else if constexpr (TOGETHER) {
      if (parts > 1) {
        if (threadIdx.x == 0) owed.items[owing] = {item, parcels, tag};
        owing++;
      }
    } else if (!WHOLE && parts > 1) {
      meet_block();
      if (meet_block.any(threadIdx.x == 0 && count_one(counter) == parts - 1)) {
        if (threadIdx.x == 0) *counter = 0;
        if constexpr (CUT_ALIKE)
          merge_parts(p, item, shared, meet_block, rank * SLICE, parts, parts_of_grid);
        else
          merge_parts(p, item, shared, meet_block, rank * SLICE, parts, part_at);
      }
    }
    if constexpr (CLUSTER > 1) cluster_wait();
    if constexpr (SINGLE) break;
    begin = end;
    if (begin >= schedule.end) break;
    item = next;
    if (TOGETHER && threadIdx.x == 0) Parcels::ask_uses(p, number_of(item), &uses);
  }
  if constexpr (TOGETHER && !SINGLE) {
    meet_block();
#pragma unroll 1
    for (int i = 0; i < owing; i++) {
      const auto& o = owed.items[i];
      merge_parcels(p, o.parcels, o.item, Rows(p, o.item), o.tag);
    }
  }
}
