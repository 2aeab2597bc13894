// Local linear attention of single query rows against a key-value cache, in one pass over the keys.
//
// A row's moments about an origin are products of one tile with itself: X holds sqrt(p) (k - k0) and
// sqrt(p) (v - v0) in float16, and X_k^T [X_k X_v] accumulates in registers of the matrix
// warpgroups (moments.cuh) while the transform warps write the next tile (weigh.cuh). Then either the blocks of a row
// add up their moments (merge.cuh), and all warps of one solve its ridge system (factor.cuh); or the matrix warps solve
// it by conjugate gradients, those of all blocks together (conjugate_together.cuh), of the row's only one (conjugate_alone.cuh) or of
// one that is given the moments of the others (gather.cuh), and leave to the factorisation what does not get there.
//
// Compile-time: HEAD_DIM (64 or 128, also the value size), CLUSTER (blocks that add up a row through distributed
// shared memory), PAGED, BOX (keys of a copy), READ_ONCE (whether each key is read once, and more of them than the
// second-level cache holds), INDEXED and PACKED (whether there are lengths or paddings, and packed sequences),
// HALF_IS_FLOAT16, SHARED_BYTES; SOLVERS (blocks that solve a row by conjugate gradients, 0 for none),
// MOST_STEPS (of these), GATHERED (blocks that share a row of which one solves it, else 0), MAIL_BYTES (of a row whose
// blocks send each other mail, or give one of them what they have), STEPS_ADDED_UP (whether they add up the products of
// steps); ROWS_IN_TURN, MOST_TURNS. Grid: rows * splits blocks; splits a power of two and a multiple of CLUSTER.

#include "lla/conjugate.cuh"
#include "lla/copies.cuh"
#include "lla/moments.cuh"
#include "lla/passes.cuh"
#include "lla/query.cuh"
#include "lla/shape.cuh"
#include "lla/weigh.cuh"
#include "ptx/dependents.cuh"
#include "ptx/opaque.cuh"
#include "ptx/registers.cuh"

#if ROWS_IN_TURN
#include "lla/turns.cuh"
#else
#include "lla/factor.cuh"
#include "lla/merge.cuh"
#endif
#if GATHERED
#include "lla/gather.cuh"
#elif SOLVERS > 1
#include "lla/conjugate_together.cuh"
#elif SOLVERS == 1 && !ROWS_IN_TURN
#include "lla/conjugate_alone.cuh"
#endif

#if !ROWS_IN_TURN
// Leaves the moments to the factorisation.
template <int KEY_COLUMNS>
__device__ __forceinline__ void matrix_role(Shared& shared, const lla::Call& call, const Maps& maps, bool whole, int tiles) {
  using Part = Moments<KEY_COLUMNS>;
  float c[D];
  accumulate_all<KEY_COLUMNS>(shared, call, maps, c, tiles);
  const Part moments{c};
  const float inverse_scale = shared.inverse_scale[0];
  const float ridge = row_of_block(call).ridge(call);
  store_moments<Part::VALUES, Part::ALL>(shared, moments, inverse_scale * inverse_scale, whole, ridge);
  meet(shared.met, shared.exact ^ 1);
  // The factorisation does not wait for these, whose accumulators are the first registers.
  if constexpr (D == 128) give_registers<128>();
  store_moments<0, Part::VALUES>(shared, moments, inverse_scale * shared.inverse_scale[1], whole, 0.0f);
}

#if SOLVERS > 0
// Leaves the moments in c, with the registers to solve the row.
template <int KEY_COLUMNS>
__device__ __forceinline__ void accumulate_to_solve(Shared& shared, const lla::Call& call, const Maps& maps, int tiles, float (&c)[D]) {
  float accumulators[D];
  accumulate_all<KEY_COLUMNS>(shared, call, maps, accumulators, tiles);
#if SOLVERS == 1
  leave_right_side(shared, thread_index());
#endif
  complete_moments<D == 128 && KEY_COLUMNS == 64>(shared, accumulators, thread_index());
  if constexpr (D == 128) take_registers<SOLVING_REGISTERS>();
  park(shared, accumulators, thread_index(), c);
}

// Solves the row, or leaves the moments to the factorisation. From here on the warpgroups run the same code: what is fetched
// for one is there for the other.
__device__ __forceinline__ void solving_matrix_role(Shared& shared, const lla::Call& call, const Maps& maps, int tiles, int warpgroup) {
  float c[D];
  if (D == 64 || warpgroup == 0)
    accumulate_to_solve<64>(shared, call, maps, tiles, c);
  else
    accumulate_to_solve<D>(shared, call, maps, tiles, c);
  const float ridge = row_of_block(call).ridge(call);
#if SOLVERS > 1
  const Exchange exchange(shared, call);
  // The sums of all blocks are there.
  meet(shared.met, shared.exact ^ 1);
  const bool solved = solve_together(shared, call, ridge, exchange, c);
  // All blocks of the row have read it.
  if (thread_index() == 0 && exchange.split == 0) count_use(exchange.mail, exchange.tag);
#else
  meet_matrix_warps();
  const bool solved = solve_alone(shared, call, ridge, c);
#endif
  if (thread_index() == 0) shared.solved_by_steps = solved;
  if (!solved) leave_to_factorisation(shared, c, !TOGETHER || shared.blocks == 1, ridge);
  meet(shared.met, shared.exact ^ !TOGETHER);
  if constexpr (D == 128)
    if (!solved) give_registers<128>();
}
#endif

__device__ __forceinline__ void transform_role(Shared& shared, const lla::Call& call, const Maps& maps, int tiles) {
  while (weigh(shared, call, maps, tiles, 0, 0), again<SENT_AHEAD>(shared, TRANSFORM, TRANSFORM_THREADS))
    bring_first(shared, call, maps, Source(shared), tiles);
  // A thread for every column.
  const int column = thread_index() - MATRIX_THREADS;
  const float mean = mean_of(shared, column);
  if constexpr (CONJUGATE_GRADIENTS && D == 128) give_registers<256 - SOLVING_REGISTERS>();
  let_next_launch_begin();
  // The row's if the block has it to itself, or is alone with a short one.
  shared.own.mean[column] = shared.total.mean[column] = mean;
#if SOLVERS > 1
  // Without tiles nothing says that the tag is there.
  if (SENT_AHEAD && tiles == 0) wait_for_products(shared);
  const Exchange exchange(shared, call);
  share_sums(shared, exchange);
  meet(shared.met, shared.exact ^ 1);
  if (ADDED_UP && exchange.split == 0) clear_next(exchange);
#else
  prefetch_next(call, maps);
#endif
  meet(shared.met, shared.exact ^ !TOGETHER);
}
#endif

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    lla_kernel(const __grid_constant__ lla::Call call, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) prefetch_map(maps.k), prefetch_map(maps.v);
  // No more than the first tiles need, which are asked for as soon as is known where they lie.
  if (threadIdx.x == MATRIX_THREADS) begin_barriers(shared, 0, AT_FIRST, 1), begin_pass(shared), shared.bad_page = 0;
  // Nothing before has touched global memory.
  wait_for_launch_ahead();

  const int split = blockIdx.x & (call.splits - 1);
#if ROWS_IN_TURN
  int number = 0;
  const int item = next_item(call, number, threadIdx.x);
  if (item < 0) return;
#else
  const int item = blockIdx.x >> call.splits_log2;
#endif
  const lla::Row row(call, item);
  // The clusters that take part: a short row is left to fewer.
  const int keys_of_row = row.keys();
  constexpr int CLUSTER_KEYS = MIN_SPLIT_KEYS * CLUSTER;
  const int clusters =
      min(max((keys_of_row + CLUSTER_KEYS - 1) / CLUSTER_KEYS, 1), max(call.splits / CLUSTER, 1));
  if (split >= clusters * CLUSTER) return;
  if (keys_of_row == 0) {
    if (split == 0 && threadIdx.x < D)
      output_of(call, row)[threadIdx.x] = narrow<BFLOAT>(row.valid ? 0.0f : quiet_nan());
    return;
  }
  const int start = begin_of_boxes(row), length = row.end - start;
  int share = (length + CLUSTER * TILE - 1) / (CLUSTER * TILE);
  if (clusters > 1) share = lla::divide(share + clusters - 1, clusters);
  const int begin = start + split * share * TILE, end = min(begin + share * TILE, row.end);
  const int tiles = max(0, end - begin + TILE - 1) / TILE;

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  QueryPiece query;
  unsigned long long uses = 0;
  if (warpgroup < MATRIX_WARPGROUPS) {
    // By all warps: one after the other, barriers take 80 clocks each.
    if (threadIdx.x % 32 == 0) begin_barriers(shared, SLOTS + warp, BARRIERS, MATRIX_WARPS);
    // Not before: a fence waits for loads.
#if SOLVERS > 1
    if (threadIdx.x == 0) uses = load_relaxed(&mail_of_row(call)->uses);
#elif GATHERED
    if (warp == CHOOSING_WARP) uses = ask_last_use(call, threadIdx.x % 32, clusters);
#endif
    query.load(query_of(call, row), threadIdx.x);
  } else {
    barrier_sync(TRANSFORM, TRANSFORM_THREADS);
    // Of all that a block does, the keys take longest to come.
    bring_first(shared, call, maps, Source(begin, end, row.batch, row.kv_head), tiles);
    if (threadIdx.x % 32 == 0) begin_barriers(shared, AT_FIRST + warp - MATRIX_WARPS, SLOTS, TRANSFORM_WARPS);
  }
  if (threadIdx.x == 0) {
    shared.begin = begin, shared.first = max(begin, row.first), shared.end = end;
    shared.batch = row.batch, shared.kv_head = row.kv_head;
    shared.exact = 0;
    if constexpr (TOGETHER || IS_GATHERED) shared.blocks = clusters * CLUSTER;
#if ROWS_IN_TURN
    shared.item = item, shared.number = number, shared.turn = 0, shared.unsolved = shared.by_factor = 0;
    mbarrier_init(shared_address(&shared.taken), 4 * OF_WARP);
    mbarrier_init(shared_address(&shared.begun), TRANSFORM_WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.ended), MATRIX_WARPS * OF_WARP);
#endif
    mbarrier_init(shared_address(&shared.met), WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.solved), WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.panelled), WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.given), 4 * OF_WARP);
#if GATHERED
    mbarrier_init(shared_address(&shared.weighed), TRANSFORM_WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.paired), MATRIX_WARPS * OF_WARP);
    mbarrier_init(shared_address(&shared.proposed), MATRIX_WARPS * OF_WARP);
#endif
  }
  if (threadIdx.x < 2 * D) shared.origin[threadIdx.x] = 0.0f;
  BlockMeeting meet_block(shared.synced, THREADS);
  __syncthreads();
#if SOLVERS > 1
  // Read after the keys, by when it has come.
  if (threadIdx.x == 0) shared.tag = first_tag(uses);
#endif

  // The accumulators of 128 channels need registers that the transform warps give up: 64 Ki in all.
  [[maybe_unused]] const bool whole = IS_GATHERED || clusters * CLUSTER == 1;
  if (warpgroup < MATRIX_WARPGROUPS) {
    if (threadIdx.x < QUERY_PIECES) reinterpret_cast<uint4*>(shared.query)[threadIdx.x] = query.packed();
    fence_async_proxy();
    barrier_sync(MATRIX, MATRIX_THREADS);
    if constexpr (D == 128) take_registers<MATRIX_REGISTERS>();
#if GATHERED
    // Not before: the others go on.
    if (warp == CHOOSING_WARP) begin_choice(shared, call, uses);
  }
  if (!gather_and_solve(shared, call, maps, tiles, warpgroup < MATRIX_WARPGROUPS)) return;
#elif ROWS_IN_TURN
    matrix_rows(shared, call, maps, warpgroup);
  } else {
    if constexpr (D == 128) give_registers<256 - MATRIX_REGISTERS>();
    transform_rows(shared, call, maps);
  }
#else
#if SOLVERS > 0
    solving_matrix_role(shared, call, maps, tiles, warpgroup);
    if (shared.solved_by_steps) return;
#else
    if (D == 64 || warpgroup == 0)
      matrix_role<64>(shared, call, maps, whole, tiles);
    else
      matrix_role<D>(shared, call, maps, whole, tiles);
#endif
  } else {
    if constexpr (D == 128) give_registers<256 - MATRIX_REGISTERS>();
    transform_role(shared, call, maps, tiles);
    if (CONJUGATE_GRADIENTS && shared.solved_by_steps) return;
    if constexpr (D == 128) take_registers<128>();
  }
#endif
#if !ROWS_IN_TURN

  // Read anew: kept over the tiles, the row's indices would cost registers.
  const int of_block = item_of_block(call);
  const lla::RowIndex index(call, of_block);
  if (!whole) {
    meet_block();
    if (!merge(shared, meet_block, call, index, of_block, clusters)) return;
  }
  solve_slope(shared, call, index);
  write_output(shared, meet_block, call, index);
#endif
}
