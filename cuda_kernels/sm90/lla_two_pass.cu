// Local linear attention of single query rows against a key-value cache, in two passes: the first takes the keys alone, and
// the second the values, with the slope that solves the row's ridge system.
//
// Where a row's keys are few, solving takes most of its time. Without moments of the values there is room for two blocks a
// multiprocessor, which hide each other's latencies, and four warps of a block do with fewer instructions what eight would each
// repeat. The keys' X stays in shared memory as far as there is room for it; keys beyond that are read twice.
//
// X^T X accumulates in registers, 32 rows of it a warp (keys.cuh); conjugate gradients take it there (slope.cuh); then keys get
// the weights of the local linear fit, and values are added up by them (values.cuh).
//
// Compile-time: HEAD_DIM (128, also the value size), PAGED, BOX (keys of a copy), INDEXED and PACKED (whether there are lengths or
// paddings, and packed sequences), HALF_IS_FLOAT16, SHARED_BYTES, MOST_STEPS (of conjugate gradients); CLUSTER, SOLVERS and
// MAIL_BYTES (1, 1 and 0: a block has its row to itself). Grid: rows blocks.

#include "lla/two_pass/keys.cuh"
#include "lla/two_pass/slope.cuh"
#include "lla/two_pass/values.cuh"
#include "lla/factor_alone.cuh"
#include "ptx/dependents.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    lla_kernel(const __grid_constant__ lla::Call call, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread == 0) prefetch_map(maps.k), prefetch_map(maps.v);
  // Nothing before has touched global memory.
  wait_for_launch_ahead();

  const lla::Row row(call, blockIdx.x);
  if (row.keys() == 0) {
    if (thread < D) output_of(call, row)[thread] = narrow<BFLOAT>(row.valid ? 0.0f : quiet_nan());
    return;
  }
  const int begin = begin_of_boxes(row);
  const Source source = {begin, row.first, row.end, row.batch, row.kv_head, (row.end - begin + TILE - 1) / TILE, 0};

  if (brings()) {
    // First what the first tile needs: one after the other, barriers take 80 clocks each.
    const unsigned barriers = shared_address(&shared.full[0]);
    begin_barriers<0, AT_FIRST>(barriers, LOAD_LANES, lane);
    if (lane == 0) shared.largest = shared.out_of_range = shared.bad_page = 0, shared.source = source;
    __syncwarp();
    bring_tiles<0, AT_FIRST>(shared, call, maps, source, Position(), lane);
    begin_barriers<AT_FIRST, SLOTS>(barriers, LOAD_LANES, lane);
  }
  static_assert(D == THREADS);
  const half_bits q = query_of(call, row)[thread];
  shared.query[thread / 64][thread % 64] = entry_of_column(shared.query_column, thread) = q;
  if (thread < 32) shared.zeros[thread] = 0;
  __syncthreads();

  // What is not kept in registers while a row is solved is read anew.
  Position at;
  float c[ROW_BLOCKS][D / 2];
  bool exact = false;
#pragma unroll 1
  while (true) {
    const int grew_in = take_keys(shared, call, maps, exact, at, c);
    // The same in all lanes, as the compiler sees by this. Where X left the range of float16, the keys again with the scale of the
    // largest; that of keys relative to too small a maximum counts for nothing.
    const bool anew = __any_sync(~0u, grew_in > 0), rescaled = !anew && __any_sync(~0u, !exact && shared.out_of_range);
    if (!anew && !rescaled) break;
    exact |= rescaled;
    meet();
    if (thread_index() == 0) shared.source.starts_at = (shared.source.starts_at + grew_in) % shared.source.tiles, shared.out_of_range = 0;
    if (rescaled) rescale(shared, call);
    meet();
    if (brings()) bring_tiles<0, AT_FIRST>(shared, call, maps, shared.source, at, thread_index() % 32);
  }
  // X of the last tiles stays in the ring until the slope is known. Where there are fewer tiles than slots, values come meanwhile; others
  // come near, as the memory has nothing to do.
  const int tiles = shared.source.tiles;
  int kept = min(SLOTS, tiles);
  if (brings()) {
    const int lane = thread_index() % 32;
    const Source source = shared.source;
    Loads loads(source, kept, at);
    loads.bring_next(shared, call, maps, source, SLOTS - kept, lane);
    loads.prefetch(shared, call, maps, source, lane);
  }
  let_next_launch_begin();

  const float ridge = lla::RowIndex(call, block_index()).ridge(call);
  centre_moments<0, D>({c[0], c[1]}, shared.sums, inverse_weight(shared.d1), shared.inverse_scale, thread_index());
  pair_lanes(c);
  Entries slope;
  if (!solve_by_steps(shared, c, ridge, slope)) {
    // What comes to the ring has to have come before something else may lie there, and takes X's place.
#pragma unroll 1
    for (int number = 0; number < min(SLOTS - kept, 2 * tiles - kept); number++, at.advance()) wait_for_load(shared, at);
    meet();
    solve_by_factor(shared, c[0], ridge, slope);
    fence_async_proxy();
    meet();
    kept = 0;
    if (brings()) {
      const Source source = shared.source;
      Loads loads(source, kept, at);
      loads.bring_next(shared, call, maps, source, SLOTS, thread_index() % 32);
    }
  }
  take_values(shared, call, maps, kept, at, slope);
}
