// Local linear attention of query rows against a key-value cache, for any head size up to 256, element type,
// strides and pages, on any GPU since sm_80; also returns the state.
//
// A row's moments about k0, a key in the middle of what it sees, are cut into blocks of BLOCK x BLOCK and the keys
// into splits; a thread block takes one block of one split, in fp32. The last one of a row to finish merges the
// splits, factors the ridge system and writes the output.
//
// Compile-time: ELEMENT (0 float32, 1 float16, 2 bfloat16), BLOCK (64 or 128), PAGED, INDEXED and PACKED (whether there
// are lengths or paddings, and packed sequences), RETURN_STATE,
// SOLVE_IN_SHARED where the dynamic shared memory holds the packed triangle of D rows, and PROBE where there are no
// values and the output is the probe that was solved for, in float32.
// Grid: rows * splits * blocks; call.first_row numbers the first row of a launch.

#include "lla/rows.cuh"
#include "ptx/numbers.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int TILE = 16;  // keys
constexpr int MAX_DIM = 256;
constexpr int EDGE = BLOCK / 16;  // a thread's square of a block of moments
constexpr int MIN_SPLIT_KEYS = 256;
constexpr float LOG2_E = 1.4426950408889634f;

constexpr bool FLOAT = ELEMENT == 0, BFLOAT = ELEMENT == 2;
#if ELEMENT == 0
using Element = float;
#else
using Element = half_bits;
#endif

__device__ __forceinline__ float to_float(Element x) { return FLOAT ? x : widen<BFLOAT>(x); }
__device__ __forceinline__ Element to_element(float x) { return FLOAT ? Element(x) : narrow<BFLOAT>(x); }

#if PROBE
using Output = float;
#else
using Output = Element;
#endif

__device__ __forceinline__ Output* output_of(const lla::Call& call, const lla::Row& row) {
  return static_cast<Output*>(call.out) + row.offset(call.out_stride);
}

__device__ __forceinline__ const Element* elements(const void* p) { return static_cast<const Element*>(p); }

__device__ __forceinline__ float exponential(float x) { return exp2f(x * LOG2_E); }

// Weighted sums of a split: the moments of [k - k0; v] with k - k0, row by row, then the sums of both, d1 and m.
struct Partial {
  float* moments;  // (D + Dv, D)
  float* sums;     // D + Dv
  float* d1;
  float* m;

  __device__ __forceinline__ Partial(const lla::Call& call, long long number) {
    const long long rows = call.head_dim + call.value_dim;
    moments = call.partials + number * (rows * call.head_dim + rows + 2);
    sums = moments + rows * call.head_dim;
    d1 = sums + rows;
    m = d1 + 1;
  }
};

struct Shared {
  alignas(16) float keys[TILE][MAX_DIM + 4];   // k - k0
  alignas(16) float values[TILE][BLOCK + 4];
  float query[MAX_DIM], origin[MAX_DIM];
  float scores[TILE];
  float right_side[MAX_DIM], column[MAX_DIM], slope[MAX_DIM], inverse[MAX_DIM], kbar[MAX_DIM];
  unsigned bad_page, is_last;
};

// One block of moments of one split of a row, into its partial.
__device__ __forceinline__ void accumulate(Shared& shared, const lla::Call& call, const lla::Row& row, int begin,
                                           int end, int row_block, int column_block, Partial partial) {
  const int D = call.head_dim, Dv = call.value_dim;
  const int key_blocks = (D + BLOCK - 1) / BLOCK;
  const bool of_values = row_block >= key_blocks;
  const int first_value = (row_block - key_blocks) * BLOCK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int y = threadIdx.x / 16 * EDGE, x = threadIdx.x % 16 * EDGE;

  float c[EDGE][EDGE] = {};
  float m = minus_infinity(), d1 = 0.0f, sum = 0.0f;
  for (int tile = begin; tile < end; tile += TILE) {
    const int keys = min(TILE, end - tile);
    __syncthreads();
    for (int j = warp; j < TILE; j += WARPS) {
      float score = 0.0f;
      const lla::Place place(call, row.batch, tile + min(j, keys - 1));
      if (!place.valid) atomicMax(&shared.bad_page, 1);
      const bool seen = j < keys && place.valid;
      const Element* k = elements(call.k) + place.offset(call.k_stride, row.kv_head);
      const Element* v = elements(call.v) + place.offset(call.v_stride, row.kv_head);
      // Columns up to a whole number of blocks are zero, so that the products need no bounds.
      for (int i = lane; i < key_blocks * BLOCK; i += 32) {
        const float key = seen && i < D ? to_float(k[i]) : 0.0f;
        score += i < D ? key * shared.query[i] : 0.0f;
        shared.keys[j][i] = seen && i < D ? key - shared.origin[i] : 0.0f;
      }
      if (of_values)
        for (int i = lane; i < BLOCK; i += 32)
          shared.values[j][i] = seen && first_value + i < Dv ? to_float(v[first_value + i]) : 0.0f;
#pragma unroll
      for (int offset = 16; offset; offset /= 2) score += __shfl_xor_sync(~0u, score, offset);
      if (lane == 0) shared.scores[j] = seen ? score * call.scale : minus_infinity();
    }
    __syncthreads();
    float tile_max = m;
#pragma unroll
    for (int j = 0; j < TILE; j++) tile_max = fmaxf(tile_max, shared.scores[j]);
    if (tile_max > m) {
      const float rescale = exponential(m - tile_max);
      m = tile_max;
      d1 *= rescale, sum *= rescale;
#pragma unroll
      for (int i = 0; i < EDGE; i++)
#pragma unroll
        for (int k = 0; k < EDGE; k++) c[i][k] *= rescale;
    }
    for (int j = 0; j < keys; j++) {
      const float weight = exponential(shared.scores[j] - m);
      const float* left = of_values ? shared.values[j] : shared.keys[j] + row_block * BLOCK;
      const float* right = shared.keys[j] + column_block * BLOCK;
      d1 += weight;
      if (threadIdx.x < BLOCK) sum += weight * left[threadIdx.x];
      float b[EDGE];
#pragma unroll
      for (int k = 0; k < EDGE; k++) b[k] = right[x + k];
#pragma unroll
      for (int i = 0; i < EDGE; i++) {
        const float a = weight * left[y + i];
#pragma unroll
        for (int k = 0; k < EDGE; k++) c[i][k] += a * b[k];
      }
    }
  }
  const int first_row = of_values ? D + first_value : row_block * BLOCK;
  const int last_row = of_values ? D + Dv : D;
#pragma unroll
  for (int i = 0; i < EDGE; i++)
#pragma unroll
    for (int k = 0; k < EDGE; k++) {
      const int r = first_row + y + i, column = column_block * BLOCK + x + k;
      if (r < last_row && column < D) partial.moments[static_cast<long long>(r) * D + column] = c[i][k];
    }
  if (column_block == 0 && threadIdx.x < BLOCK && first_row + threadIdx.x < last_row)
    partial.sums[first_row + threadIdx.x] = sum;
  if (row_block == 0 && threadIdx.x == 0) {
    *partial.d1 = d1;
    *partial.m = m;
  }
  // Every block of the split sees the same pages.
  if (shared.bad_page && threadIdx.x == 0 && row_block == 0) *partial.d1 = quiet_nan();
}

// Adds up the splits in their order, into the first one's place.
__device__ __forceinline__ void merge(const lla::Call& call, long long first, int splits) {
  const int D = call.head_dim, rows = D + call.value_dim;
  const int entries = rows * D + rows + 1;
  const Partial whole(call, first);
  float m = minus_infinity();
  for (int s = 0; s < splits; s++) m = fmaxf(m, __ldcg(Partial(call, first + s).m));
  for (int e = threadIdx.x; e < entries; e += THREADS) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      const Partial part(call, first + s);
      const float part_m = __ldcg(part.m);
      sum += (m == minus_infinity() ? 1.0f : exponential(part_m - m)) * __ldcg(part.moments + e);
    }
    whole.moments[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) *whole.m = m;
}

__device__ __forceinline__ void solve(Shared& shared, float* triangle, const lla::Call& call, const lla::Row& row,
                                      const Partial& moments) {
  const int D = call.head_dim, Dv = call.value_dim;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const float d1 = *moments.d1, inverse_d1 = 1.0f / d1, ridge = row.ridge(call);
  if (t < D) {
    shared.kbar[t] = moments.sums[t] * inverse_d1;
    shared.right_side[t] = shared.query[t] - shared.origin[t] - shared.kbar[t];
  }
  __syncthreads();
  auto at = [](int i, int j) { return i * (i + 1) / 2 + j; };
  for (int i = warp; i < D; i += WARPS)
    for (int j = lane; j <= i; j += 32)
      triangle[at(i, j)] = moments.moments[i * D + j] * inverse_d1 - shared.kbar[i] * shared.kbar[j] +
                           (i == j ? ridge : 0.0f);
  for (int k = 0; k < D; k++) {
    __syncthreads();
    const float pivot = triangle[at(k, k)];
    // Not positive definite: NaN, which spreads to the whole output.
    const float inverse = pivot > 0.0f && ridge > 0.0f ? 1.0f / sqrtf(pivot) : quiet_nan();
    const float y = shared.right_side[k] * inverse;
    float l = 0.0f;
    if (t > k && t < D) {
      l = triangle[at(t, k)] * inverse;
      shared.column[t] = l;
    }
    __syncthreads();
    if (t == k) shared.right_side[k] = y, shared.inverse[k] = inverse;
    if (t > k && t < D) {
      shared.right_side[t] -= l * y;
      triangle[at(t, k)] = l;
    }
    for (int i = k + 1 + warp; i < D; i += WARPS)
      for (int j = k + 1 + lane; j <= i; j += 32) triangle[at(i, j)] -= shared.column[i] * shared.column[j];
  }
  for (int k = D - 1; k >= 0; k--) {
    __syncthreads();
    const float u = shared.right_side[k] * shared.inverse[k];
    if (t == k) shared.slope[k] = u;
    if (t < k) shared.right_side[t] -= triangle[at(k, t)] * u;
  }
  __syncthreads();
#if PROBE
  for (int k = t; k < D; k += THREADS) output_of(call, row)[k] = -shared.slope[k];
#else
  float along = 0.0f;
  for (int k = lane; k < D; k += 32) along += shared.kbar[k] * shared.slope[k];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) along += __shfl_xor_sync(~0u, along, offset);
  Output* out = output_of(call, row);
  for (int v = warp; v < Dv; v += WARPS) {
    float moment = 0.0f;
    for (int k = lane; k < D; k += 32)
      moment += moments.moments[static_cast<long long>(D + v) * D + k] * shared.slope[k];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) moment += __shfl_xor_sync(~0u, moment, offset);
    const float mean = moments.sums[D + v] * inverse_d1;
    if (lane == 0) out[v] = to_element(mean + moment * inverse_d1 - mean * along);
  }
#endif
}

#if RETURN_STATE
// moments: null where the row saw no key, whose state is empty.
__device__ __forceinline__ void write_state(const Shared& shared, const lla::Call& call, const lla::Row& row,
                                            long long item, const Partial* moments) {
  const int D = call.head_dim, Dv = call.value_dim;
  const float empty = row.valid ? 0.0f : quiet_nan();
  for (int i = threadIdx.x; i < D; i += THREADS) {
    call.k0[item * D + i] = moments ? shared.origin[i] : empty;
    call.wk[item * D + i] = moments ? moments->sums[i] : empty;
    call.state_q[item * D + i] = shared.query[i];
  }
  for (int i = threadIdx.x; i < Dv; i += THREADS) call.wv[item * Dv + i] = moments ? moments->sums[D + i] : empty;
  for (int e = threadIdx.x; e < D * D; e += THREADS) {
    const int i = max(e / D, e % D), j = min(e / D, e % D);
    call.wkk[item * D * D + e] = moments ? moments->moments[i * D + j] : empty;
  }
  for (int e = threadIdx.x; e < Dv * D; e += THREADS)
    call.wvk[item * Dv * D + e] = moments ? moments->moments[D * D + e] : empty;
  if (threadIdx.x == 0) {
    call.m[item] = moments ? *moments->m : row.valid ? minus_infinity() : quiet_nan();
    call.d1[item] = moments ? *moments->d1 : empty;
    call.state_ridge[item] = row.ridge(call);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) lla_kernel(const __grid_constant__ lla::Call call) {
  __shared__ Shared shared;
  const int D = call.head_dim, Dv = call.value_dim;
  const int key_blocks = (D + BLOCK - 1) / BLOCK, value_blocks = (Dv + BLOCK - 1) / BLOCK;
  // Lower triangle of the keys' blocks, then all of the values'.
  const int triangle_blocks = key_blocks * (key_blocks + 1) / 2;
  const int blocks = triangle_blocks + value_blocks * key_blocks;

  int block = blockIdx.x % blocks;
  const int split = blockIdx.x / blocks % call.splits;
  const int slot = blockIdx.x / blocks / call.splits;
  const int item = call.first_row + slot;
  const lla::Row row(call, item);
  const int keys = row.keys();
  const int splits = min(max((keys + MIN_SPLIT_KEYS - 1) / MIN_SPLIT_KEYS, 1), call.splits);
  if (split >= splits) return;

  const Element* q = elements(call.q) + row.offset(call.q_stride);
  if (threadIdx.x == 0) shared.bad_page = 0;
  for (int i = threadIdx.x; i < D; i += THREADS) shared.query[i] = to_float(q[i]);
  __syncthreads();
  if (keys == 0) {
    if (block != 0) return;
    const float nothing = row.valid ? 0.0f : quiet_nan();
    for (int i = threadIdx.x; i < (PROBE ? D : Dv); i += THREADS)
      output_of(call, row)[i] = PROBE ? Output(nothing) : Output(to_element(nothing));
#if RETURN_STATE
    write_state(shared, call, row, item, nullptr);
#endif
    return;
  }
  const lla::Place middle(call, row.batch, row.first + keys / 2);
  const Element* k0 = elements(call.k) + (middle.valid ? middle.offset(call.k_stride, row.kv_head) : 0);
  for (int i = threadIdx.x; i < D; i += THREADS) shared.origin[i] = middle.valid ? to_float(k0[i]) : 0.0f;

  int row_block = 0, column_block = 0;
  if (block < triangle_blocks) {
    while (block > row_block) block -= ++row_block;
    column_block = block;
  } else {
    block -= triangle_blocks;
    row_block = key_blocks + block / key_blocks;
    column_block = block % key_blocks;
  }
  const int share = (keys + splits - 1) / splits;
  const int begin = row.first + min(split * share, keys), end = min(begin + share, row.end);
  const long long first = static_cast<long long>(slot) * call.splits;
  accumulate(shared, call, row, begin, end, row_block, column_block, Partial(call, first + split));

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned count = splits * blocks;
    shared.is_last = atomicAdd(call.counters + slot, 1) == count - 1;
    if (shared.is_last) call.counters[slot] = 0;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();

  merge(call, first, splits);
  __syncthreads();
  const Partial moments(call, first);
#if SOLVE_IN_SHARED
  extern __shared__ float triangle[];
#else
  // One after the partials of all rows of a launch for each of them.
  float* triangle = Partial(call, static_cast<long long>(gridDim.x / blocks)).moments +
                    static_cast<long long>(slot) * (D * (D + 1) / 2);
#endif
  solve(shared, triangle, call, row, moments);
#if RETURN_STATE
  write_state(shared, call, row, item, &moments);
#endif
}
