#pragma once
// A block's rows in turn. While the matrix warps solve one by conjugate gradients, the transform warps have the first tiles of the next
// brought and make them X: the memory and the rest of the multiprocessor would have nothing to do. Then only the tiles that the ring
// had no room for are left to take.
//
// A row that steps do not solve waits until all others were taken; it is taken once more then, and factored.

#include "lla/conjugate_alone.cuh"
#include "lla/copies.cuh"
#include "lla/factor_alone.cuh"
#include "lla/moments.cuh"
#include "lla/weigh.cuh"
#include "ptx/dependents.cuh"

static_assert(MOST_TURNS <= 32, "a bit of shared.unsolved for each");

// The block's next row that sees a key, the number of which is `number` or more; -1 where there is none. Rows that see none get their
// output; by D threads or more.
__device__ __forceinline__ int next_item(const lla::Call& call, int& number, int thread) {
#pragma unroll 1
  for (;; number++) {
    const int item = block_index() + number * gridDim.x;
    if (item >= call.rows) return -1;
    const lla::Row row(call, item);
    if (row.keys() > 0) return item;
    if (thread < D) output_of(call, row)[thread] = narrow<BFLOAT>(row.valid ? 0.0f : quiet_nan());
  }
}

// Where the query of a turn lies.
__device__ __forceinline__ unsigned query_run_of(unsigned turn) { return turn % QUERIES * RUNS; }

__device__ __forceinline__ int tiles_of(const Source& from) { return (from.end - from.begin + TILE - 1) / TILE; }
__device__ __forceinline__ int tiles_of(const Shared& shared) { return tiles_of(Source(shared)); }

// All warps come here, between what the transform warps leave and what is solved with it, and wait for the others. A row's meetings are
// even in number.
__device__ __forceinline__ void come_to_solve(const Shared& shared) {
  if (shared.exact) meet(shared.met, 0);
  come(shared.met);
}
__device__ __forceinline__ void wait_to_solve(const Shared& shared) { mbarrier_wait(shared_address(&shared.met), 1); }

// What the matrix warps solve the row with, from its sums; by the transform warps.
__device__ __forceinline__ void leave_to_solve(Shared& shared, const lla::Call& call, unsigned turn) {
  const int column = thread_index() - MATRIX_THREADS;
  const float shift = shared.sums[column] * inverse_weight(shared.own.d1), mean = shared.origin[column] + shift;
  shared.own.mean[column] = mean;
  if (column < D) {
    entry_of_row(shared.solving.right, column) = query_at(shared, column, query_run_of(turn)) - mean;
    entry_of_row(shared.solving.shift, column) = shift;
  }
  if (column == 0) {
    shared.solving.factor = shared.inverse_scale[0] * shared.inverse_scale[1];
    const lla::RowIndex row(call, shared.item);
    shared.solving.output = output_of(call, row), shared.solving.ridge = row.ridge(call);
    shared.solving.number = shared.number, shared.solving.turn = turn;
  }
}

// Finds the row after this one, long before its turn, or takes that of a number, and loads its query. turn: its own. By the transform warps,
// which meet before they need it.
__device__ __forceinline__ void find_next(Shared& shared, const lla::Call& call, int number, unsigned turn) {
  const int thread = thread_index() - MATRIX_THREADS;
  const int item = next_item(call, number, thread);
  auto& next = shared.next;
  if (thread == 0) next.item = item, next.number = number;
  if (item < 0) return;
  const lla::Row row(call, item);
  static_assert(QUERY_PIECES <= TRANSFORM_THREADS);
  QueryPiece query;
  query.load(query_of(call, row), thread);
  if (thread == 0) {
    next.begin = begin_of_boxes(row), next.first = row.first, next.end = row.end, next.batch = row.batch, next.kv_head = row.kv_head;
  }
  if (thread < QUERY_PIECES) reinterpret_cast<uint4*>(shared.query[query_run_of(turn)])[thread] = query.packed();
  fence_async_proxy();
}

// The next row's first tiles are asked for; by the transform warps, when the block is done with all tiles before.
__device__ __forceinline__ void bring_next(Shared& shared, const lla::Call& call, const Maps& maps) {
  const int thread = thread_index() - MATRIX_THREADS, warp = thread / 32, lane = thread % 32;
  const auto& next = shared.next;
  const Source from(next.begin, next.end, next.batch, next.kv_head);
  if (lane == 0) renew_barriers(shared, warp, BARRIERS, TRANSFORM_WARPS);
  if (thread == 0) shared.bad_page = 0;
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  bring_tiles<0, EARLY_AT_FIRST>(shared, call, maps, from, tiles_of(from), warp, lane);
}

// It is the block's row from now on, the one of a turn; by the transform warps.
__device__ __forceinline__ void begin_next(Shared& shared, unsigned turn) {
  const int thread = thread_index() - MATRIX_THREADS;
  if (thread == 0) {
    const auto& next = shared.next;
    begin_pass(shared), shared.exact = 0;
    shared.begin = next.begin, shared.first = next.first, shared.end = next.end, shared.batch = next.batch, shared.kv_head = next.kv_head;
    shared.item = next.item, shared.number = next.number, shared.turn = turn;
  }
  shared.origin[thread] = 0.0f;
  come(shared.begun);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
}

__device__ __forceinline__ void transform_rows(Shared& shared, const lla::Call& call, const Maps& maps) {
  int early = 0;
  find_next(shared, call, shared.number + 1, 1);
#pragma unroll 1
  for (unsigned turn = 0;; turn++) {
    const int tiles = tiles_of(shared);
    while (weigh(shared, call, maps, tiles, early, turn), again(shared, TRANSFORM, TRANSFORM_THREADS))
      bring_first(shared, call, maps, Source(shared), tiles), early = 0;
    leave_to_solve(shared, call, turn);
    come_to_solve(shared);
    const bool is_next = shared.next.item >= 0;
    if (is_next) bring_next(shared, call, maps);
    wait_to_solve(shared);
    if (!is_next) {
      if (!shared.by_factor) let_next_launch_begin();
      mbarrier_wait(shared_address(&shared.ended), turn & 1);
      const unsigned left = shared.unsolved;
      barrier_sync(TRANSFORM, TRANSFORM_THREADS);
      if (!left) {
        if (thread_index() == MATRIX_THREADS) shared.item = -1;
        come(shared.begun);
        return;
      }
      if (thread_index() == MATRIX_THREADS) shared.unsolved = left & left - 1, shared.by_factor = 1;
      find_next(shared, call, __ffs(left) - 1, turn + 1);
      barrier_sync(TRANSFORM, TRANSFORM_THREADS);
      bring_next(shared, call, maps);
    }
    begin_next(shared, turn + 1);
    if (shared.by_factor) {
      // No row comes before this one is solved.
      if (thread_index() == MATRIX_THREADS) shared.next.item = -1;
    } else {
      find_next(shared, call, shared.number + 1, turn + 2);
    }
    early = min(EARLY_TILES, tiles_of(shared));
  }
}

// Solves the row of these moments by factorisation, and writes its output; by the matrix warps.
__device__ __forceinline__ void write_by_factor(Shared& shared, float ridge, float (&c)[D]) {
  const int thread = thread_index(), lane = thread % 32, column = thread % D;
  Entries slope;
  solve_by_factor(shared, c + D / 2, ridge, slope);
  LyingVector& lying = lying_slope(shared, thread);
  entries_of_lane(lying, lane) = slope;
  __syncwarp();
  const Centring centre(shared);
  const float of_shift = inner_product(slope, entries_of_lane(shared.solving.shift, lane));
  const int upper = upper_row(thread);
  multiply_values(shared, c, thread, entry_of_row(lying, upper), entry_of_row(lying, upper + 8));
  meet_matrix_warps();
  const float o = shared.own.mean[D + column] + centre.inverse_d1 * sum_of_values(shared, centre, column, of_shift);
  if (thread < D) shared.solving.output[column] = narrow<BFLOAT>(o);
}

// What steps have not solved is taken once more, unless nothing solves it; by the matrix warps.
__device__ __forceinline__ void leave_or_write_nan(Shared& shared) {
  const int thread = thread_index();
  const Entries right = right_side(shared, thread % 32);
  const float square = inner_product(right, right);
  if (square != square || !(shared.solving.ridge > 0.0f)) {
    if (thread < D) shared.solving.output[thread] = narrow<BFLOAT>(quiet_nan());
  } else if (thread == 0) {
    shared.unsolved |= 1u << shared.solving.number;
  }
}

// Leaves a row's moments in c and, of the values' first, in shared memory.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate_in_turn(Shared& shared, const lla::Call& call, const Maps& maps, int early, float (&c)[D]) {
  float accumulators[D];
  accumulate_all<KEY_COLUMNS>(shared, call, maps, accumulators, tiles_of(shared), early, query_run_of(shared.turn));
  complete_moments<D == 128 && KEY_COLUMNS == 64>(shared, accumulators, thread_index());
  // The block of moments that the first warpgroup lacked lay there. Not by a hardware barrier, which is for one place of the program.
  if (KEY_COLUMNS == 64) come(shared.taken);
  mbarrier_wait(shared_address(&shared.taken), shared.turn & 1);
  park(shared, accumulators, thread_index(), c);
}

__device__ __forceinline__ void matrix_rows(Shared& shared, const lla::Call& call, const Maps& maps, int warpgroup) {
  int early = 0;
#pragma unroll 1
  while (true) {
    float c[D];
    if (D == 64 || warpgroup == 0)
      accumulate_in_turn<64>(shared, call, maps, early, c);
    else
      accumulate_in_turn<D>(shared, call, maps, early, c);
    come_to_solve(shared);
    wait_to_solve(shared);
    const float ridge = shared.solving.ridge;
    if (shared.by_factor)
      write_by_factor(shared, ridge, c);
    else if (!solve_alone(shared, call, ridge, c))
      leave_or_write_nan(shared);
    // Read anew: kept over the row it would cost a register.
    const unsigned turn = shared.solving.turn;
    // Tiles come to where this lay.
    fence_async_proxy();
    come(shared.ended);
    mbarrier_wait(shared_address(&shared.begun), turn & 1);
    if (shared.item < 0) return;
    // By those that bring tiles to where the moments lay that waited for the slope.
    if (warpgroup == MATRIX_WARPGROUPS - 1) mbarrier_wait(shared_address(&shared.ended), turn & 1);
    early = min(EARLY_TILES, tiles_of(shared));
  }
}
