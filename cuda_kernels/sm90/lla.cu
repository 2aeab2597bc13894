// Local linear attention of single query rows against a key-value cache, in one pass over the keys.
//
// A row's moments about an origin are products of one tile with itself: X holds sqrt(p) (k - k0) and
// sqrt(p) (v - v0), rounded once to half precision, and X_k^T [X_k X_v] accumulates in registers of the matrix
// warpgroups (moments.cuh) while the transform warps write the next tile (weigh.cuh). Blocks that share a row add up
// their moments (merge.cuh). Then all warps of a block solve the row's ridge system (factor.cuh).
//
// Compile-time: HEAD_DIM (64 or 128, also the value size), CLUSTER (blocks that share a row through distributed
// shared memory), PAGED, HALF_IS_FLOAT16, SHARED_BYTES. Grid: rows * splits blocks, splits a multiple of CLUSTER.

#include "lla/factor.cuh"
#include "lla/merge.cuh"
#include "lla/moments.cuh"
#include "lla/shape.cuh"
#include "lla/weigh.cuh"
#include "ptx/registers.cuh"

// By one thread, before a pass over the tiles.
__device__ __forceinline__ void init_pass(Shared& shared) {
  for (int s = 0; s < X_STAGES; s++) {
    mbarrier_init(shared_address(&shared.x_full[s]), TRANSFORM_WARPS);
    mbarrier_init(shared_address(&shared.x_empty[s]), MATRIX_WARPGROUPS);
  }
  for (int s = 0; s < SCORE_STAGES; s++) mbarrier_init(shared_address(&shared.scores_full[s]), TRANSFORM_WARPS);
  fence_mbarrier_init();
  for (int kind = 0; kind < 2; kind++) shared.inverse_scale[kind] = 1.0f, shared.largest[kind] = 0;
  shared.out_of_range = shared.bad_page = 0;
}

__device__ __forceinline__ void end_pass(Shared& shared) {
  for (int s = 0; s < X_STAGES; s++) {
    mbarrier_invalidate(shared_address(&shared.x_full[s]));
    mbarrier_invalidate(shared_address(&shared.x_empty[s]));
  }
  for (int s = 0; s < SCORE_STAGES; s++) mbarrier_invalidate(shared_address(&shared.scores_full[s]));
}

// Whether X was out of float16's range, and the tiles must be taken again; by all threads, after a pass.
__device__ __forceinline__ bool again(Shared& shared) {
  __syncthreads();
  if (shared.exact || !shared.out_of_range) return false;
  __syncthreads();
  const int thread = thread_index();
  if (thread < 2 * D) shared.sums.origin[thread] = 0.0f;
  if (thread == 0) {
    end_pass(shared);
    init_pass(shared);
    shared.exact = 1;
  }
  __syncthreads();
  return true;
}

// KEY_COLUMNS: how many columns of the keys' moments a warpgroup has, those up to its own.
template <int KEY_COLUMNS>
__device__ __forceinline__ void matrix_role(Shared& shared, const lla::Call& call, const lla::Row& row, int begin,
                                            int tiles) {
  using Part = Moments<KEY_COLUMNS>;
  Part moments;
  do {
    accumulate<KEY_COLUMNS>(shared, call, row, moments, begin, tiles);
    barrier_sync(MATRIX, MATRIX_THREADS);
    store_moments<0, Part::KEYS>(shared, moments, shared.inverse_scale[0] * shared.inverse_scale[0]);
  } while (again(shared));
  // The factorisation does not wait for these.
  store_moments<Part::KEYS, Part::ALL>(shared, moments, shared.inverse_scale[0] * shared.inverse_scale[1]);
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR) lla_kernel(const __grid_constant__ lla::Call call) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);

  const int split = blockIdx.x % call.splits;
  const lla::Row row(call, blockIdx.x / call.splits);
  // The clusters that take part: a short row is left to fewer.
  const int keys_of_row = row.keys();
  const int clusters = min(max((keys_of_row + MIN_SPLIT_KEYS * CLUSTER - 1) / (MIN_SPLIT_KEYS * CLUSTER), 1),
                           call.splits / CLUSTER);
  if (split >= clusters * CLUSTER) return;
  if (keys_of_row == 0) {
    if (split == 0 && threadIdx.x < D)
      output_of(call, row)[threadIdx.x] = narrow<BFLOAT>(row.valid ? 0.0f : quiet_nan());
    return;
  }
  const int parts = clusters * CLUSTER;
  const int share = (keys_of_row + parts * TILE - 1) / (parts * TILE) * TILE;
  const int begin = row.first + min(split * share, keys_of_row);
  const int keys = min(begin + share, row.end) - begin;
  const int tiles = (keys + TILE - 1) / TILE;

  if (threadIdx.x < D / 16 * 5) {
    const half_bits* q = query_of(call, row);
    const int step = threadIdx.x / 5, lane = threadIdx.x % 5, at = step * 16 + lane * 2;
    uint4 pairs = {0, 0, 0, 0};
    if (lane < 4) {
      pairs.x = q[at] | static_cast<unsigned>(q[at + 1]) << 16;
      pairs.z = q[at + 8] | static_cast<unsigned>(q[at + 9]) << 16;
    }
    shared.query[step][lane] = pairs;
  }
  if (threadIdx.x < 2 * D) shared.sums.origin[threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) {
    init_pass(shared);
    shared.exact = 0;
    shared.end = begin + keys;
  }
  __syncthreads();

  // The accumulators of 128 channels need registers that the transform warps give up: 64 Ki in all.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup < MATRIX_WARPGROUPS) {
    if constexpr (D == 128) take_registers<160>();
    if (D == 64 || warpgroup == 0)
      matrix_role<64>(shared, call, row, begin, tiles);
    else
      matrix_role<D>(shared, call, row, begin, tiles);
    if constexpr (D == 128) give_registers<128>();
  } else {
    if constexpr (D == 128) give_registers<96>();
    do
      weigh(shared, call, row, begin, keys, tiles);
    while (again(shared));
    if constexpr (D == 128) take_registers<128>();
  }

  if (parts > 1) {
    __syncthreads();
    if (!merge(shared, call, clusters)) return;
  }
  // Read anew: kept over the tiles, the row's indices would cost registers.
  const lla::RowIndex index(call, block_index() / call.splits);
  solve_slope(shared, call, index);
  write_output(shared, call, index);
}
