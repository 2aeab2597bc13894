// Local linear attention of single query rows against a key-value cache, in one pass over the keys.
//
// A row's moments about an origin are products of one tile with itself: X holds sqrt(p) (k - k0) and
// sqrt(p) (v - v0), rounded once, and X_k^T [X_k X_v] accumulates in registers of the matrix warpgroups while the
// transform warps write the next tile. The sums of weighted keys and values are taken of the same rounded X, so
// that rounding cancels in the covariances. Then the row's ridge system is factored by the same warps: the matrix
// warpgroups hold the trailing matrix in registers, the transform warps the panel.
//
// The origin is the weighted mean of what was seen when the maximum last grew. It must be near the final mean: the
// tensor cores truncate when they accumulate, and far from the mean that bias is larger than the covariances.
//
// Compile-time: HEAD_DIM (64 or 128, also the value size), CLUSTER (blocks that share a row through distributed
// shared memory), PAGED, HALF_IS_FLOAT16. Grid: rows * splits blocks, splits a multiple of CLUSTER.

#include "lla/rows.cuh"
#include "lla/async_copy.cuh"
#include "lla/cluster.cuh"
#include "lla/mbarrier.cuh"
#include "lla/mma.cuh"
#include "lla/wgmma.cuh"

using namespace ptx;

// ---- shapes

constexpr int D = HEAD_DIM;
static_assert(D == 64 || D == 128, "one matrix warpgroup takes 64 key channels");
constexpr int MATRIX_WARPGROUPS = D / 64;
constexpr int MATRIX_THREADS = 128 * MATRIX_WARPGROUPS;
constexpr int TRANSFORM_WARPS = D == 64 ? 4 : 8;
constexpr int TRANSFORM_THREADS = 32 * TRANSFORM_WARPS;
constexpr int THREADS = MATRIX_THREADS + TRANSFORM_THREADS;
constexpr int BLOCKS_PER_MULTIPROCESSOR = D == 64 ? 2 : 1;

constexpr int TILE = 64;
// A multiple of 8, the width of a score product and the period of the swizzle.
constexpr int WARP_KEYS = TILE / TRANSFORM_WARPS;
constexpr int SCORES = WARP_KEYS / 4;  // of a lane
static_assert(MATRIX_THREADS == TRANSFORM_THREADS, "a matrix warp scores the keys of one transform warp");
// Below this many keys a block, merging costs more than it saves.
constexpr int MIN_SPLIT_KEYS = 512;

constexpr int X_STAGES = 2;
constexpr int X_BLOCK = TILE * 128;  // bytes: 64 channels of every key of a tile
constexpr int X_STAGE = 2 * D / 64 * X_BLOCK;

constexpr int SLOTS = 4;
// 16 bytes beyond a row, or the eight rows of ldmatrix would fall on the same banks.
constexpr int RAW_PITCH = 2 * D + 16;
constexpr int RAW_SLOT = 2 * WARP_KEYS * RAW_PITCH;

// A weight may grow to 2^8 before the moments are rescaled: its root, 16, costs X no precision.
constexpr float LAZY_LOG2 = 8.0f;
// Scores run two tiles ahead of the weights, so that nothing waits for the slowest warp's maximum.
constexpr int SCORES_AHEAD = 2;
constexpr int SCORE_STAGES = 4;

// ---- the factorisation: panels of 8 columns; matrix thread (y, x) holds rows i * Y + y, columns 8 j + x
constexpr int PANEL = 8;
constexpr int PANELS = D / PANEL;
constexpr int Y = MATRIX_THREADS / 8;
constexpr int ROWS_PER_THREAD = D / Y;
constexpr int MOMENT_PITCH = 2 * D + 8;           // floats; 8 rows apart are 8 banks apart
constexpr int FACTOR_PANEL = D * PANEL + PANEL;   // floats; the panels' equal rows fall on different banks

// ---- shared memory

// What a block knows of its keys beside their moments, in the order of a partial.
struct Sums {
  float x[2 * D];       // sum w (k - k0), sum w (v - v0)
  float origin[2 * D];  // k0, v0
  float d1, m, unused[2];
};
constexpr int SUMS_FLOATS = sizeof(Sums) / 4;
constexpr int PARTIAL_FLOATS = 2 * D * D + SUMS_FLOATS;
constexpr int MAX_CLUSTERS = 16;  // of a row

struct Shared {
  union {
    struct {
      alignas(1024) unsigned char x[X_STAGES][X_STAGE];
      alignas(16) unsigned char raw[TRANSFORM_WARPS][SLOTS][RAW_SLOT];
    };
    struct {
      alignas(16) float moments[D][MOMENT_PITCH];  // [X_k^T X_k, X_k^T X_v]
      union {
        alignas(16) float factor[PANELS][FACTOR_PANEL];  // rows of L, a panel at a time
        Sums parts[MAX_CLUSTERS];
      };
    };
  };
  union {
    alignas(16) float panel[D][PANEL];  // the next panel's columns, from the matrix threads to the panel threads
    alignas(16) float staged[TRANSFORM_WARPS][2 * D];
  };
  // What moves the moments to a new origin: the sums before it, and how far it is.
  alignas(16) float moved_sums[2 * D];
  alignas(16) float shift[2 * D];
  float moved_d1;
  // The query as row 0 of a score product's left operand, what lanes 0 to 3 hold; that of all others is zero.
  alignas(8) uint2 query[D / 16][5];
  alignas(16) float right_side[D];
  float pivot_inverse[D];
  float slope[D];
  alignas(16) Sums sums;
  alignas(16) float scores[SCORE_STAGES][TILE];
  alignas(16) float maxima[SCORE_STAGES][TRANSFORM_WARPS];
  float warp_d1[TRANSFORM_WARPS];
  float rescale[X_STAGES];
  unsigned is_last;
  unsigned bad_page;
  alignas(8) unsigned long long raw_full[TRANSFORM_WARPS][SLOTS];
  unsigned long long x_full[X_STAGES];
  unsigned long long x_empty[X_STAGES];
  unsigned long long scores_full[SCORE_STAGES];
};
static_assert(sizeof(Shared) <= 227 * 1024 / BLOCKS_PER_MULTIPROCESSOR - 1024 * (BLOCKS_PER_MULTIPROCESSOR - 1));

// Hardware barriers; 0 is the block's.
enum : int { PANEL_FACTORED = 1, PANEL_UPDATED = 2, TRANSFORM_BARRIER = 3 };

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- numbers

#define MINUS_INFINITY __int_as_float(0xff800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float2 widen(unsigned pair) {
#if HALF_IS_FLOAT16
  float2 x;
  asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %2;\ncvt.f32.f16 %0, lo;\ncvt.f32.f16 %1, hi;\n}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
#else
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
#endif
}

__device__ __forceinline__ unsigned round_pair(float lo, float hi) {
  unsigned pair;
#if HALF_IS_FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
#endif
  return pair;
}

__device__ __forceinline__ unsigned short round_one(float x) { return round_pair(x, 0.0f) & 0xffff; }

__device__ __forceinline__ const unsigned short* half_pointer(const void* p) {
  return static_cast<const unsigned short*>(p);
}

// The factor that brings moments relative to the maximum m to the maximum `to`.
__device__ __forceinline__ float rescaling(float m, float to) {
  return to == MINUS_INFINITY ? 1.0f : exp2_approximate(m - to);
}

// ---- merging the splits of a row

constexpr int SLICE_ROWS = D / CLUSTER;
constexpr int QUADS = 2 * D / 4;

// The moments of four neighbouring columns, moved to the common origin; shared.parts holds shifts for origins.
__device__ __forceinline__ void add_part(float4& sum, float4 moments, float factor, const Sums& part, int row, int quad) {
  const float s = part.x[row], shift = part.origin[row], d1 = part.d1;
  const float4 t = reinterpret_cast<const float4*>(part.x)[quad];
  const float4 shifts = reinterpret_cast<const float4*>(part.origin)[quad];
  sum.x += factor * (moments.x + s * shifts.x + shift * (t.x + d1 * shifts.x));
  sum.y += factor * (moments.y + s * shifts.y + shift * (t.y + d1 * shifts.y));
  sum.z += factor * (moments.z + s * shifts.z + shift * (t.z + d1 * shifts.z));
  sum.w += factor * (moments.w + s * shifts.w + shift * (t.w + d1 * shifts.w));
}

// Turns the origins of `count` parts into shifts from that of the part of the largest score, and gives the sums of
// all of them to shared.sums. Every thread returns the common maximum.
__device__ __forceinline__ float merge_sums(Shared& shared, int count, int thread) {
  barrier_sync(0, THREADS);
  float m = MINUS_INFINITY;
  int largest = 0;
  for (int c = 0; c < count; c++)
    if (shared.parts[c].m > m) m = shared.parts[c].m, largest = c;
  if (thread < 2 * D) {
    const float origin = shared.parts[largest].origin[thread];
    float x = 0.0f;
    for (int c = 0; c < count; c++) {
      Sums& part = shared.parts[c];
      const float shift = part.origin[thread] - origin;
      part.origin[thread] = shift;
      x += rescaling(part.m, m) * (part.x[thread] + part.d1 * shift);
    }
    shared.sums.x[thread] = x;
    shared.sums.origin[thread] = origin;
  }
  if (thread == 0) {
    float d1 = 0.0f;
    for (int c = 0; c < count; c++) d1 += rescaling(shared.parts[c].m, m) * shared.parts[c].d1;
    shared.sums.d1 = d1;
    shared.sums.m = m;
  }
  barrier_sync(0, THREADS);
  return m;
}

// Adds up this row's parts, one slice of the moments a block of the cluster, into the moments and sums of the
// cluster's first block; true there once they are the whole row's.
__device__ __forceinline__ bool merge(Shared& shared, const lla::Call& call, int item, int clusters, int thread) {
  const int rank = CLUSTER == 1 ? 0 : blockIdx.x % CLUSTER;
  if constexpr (CLUSTER > 1) {
    cluster_barrier();
    for (int e = thread; e < CLUSTER * SUMS_FLOATS; e += THREADS) {
      const unsigned at = shared_address(reinterpret_cast<float*>(&shared.sums) + e % SUMS_FLOATS);
      reinterpret_cast<float*>(shared.parts)[e] = remote_load(remote_address(at, e / SUMS_FLOATS));
    }
    // All have read the blocks' sums before those are replaced by the cluster's.
    cluster_barrier();
    const float m = merge_sums(shared, CLUSTER, thread);
    float factor[CLUSTER];
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) factor[c] = rescaling(shared.parts[c].m, m);
    for (int e = thread; e < SLICE_ROWS * QUADS; e += THREADS) {
      const int r = rank * SLICE_ROWS + e / QUADS;
      const unsigned at = shared_address(&shared.moments[r][e % QUADS * 4]);
      float4 part[CLUSTER], sum = {0, 0, 0, 0};
#pragma unroll
      for (int c = 0; c < CLUSTER; c++) part[c] = remote_load4(remote_address(at, c));
#pragma unroll
      for (int c = 0; c < CLUSTER; c++) add_part(sum, part[c], factor[c], shared.parts[c], r, e % QUADS);
      if (clusters == 1)
        remote_store4(remote_address(at, 0), sum);
      else
        *reinterpret_cast<float4*>(&shared.moments[r][e % QUADS * 4]) = sum;
    }
    // A block leaves, or replaces its slice, only when no other reads its memory any more.
    cluster_barrier();
  }
  if (clusters == 1) return rank == 0;

  const int cluster = blockIdx.x / CLUSTER % (call.splits / CLUSTER);
  float* parts = call.partials + static_cast<long long>(item) * (call.splits / CLUSTER) * PARTIAL_FLOATS;
  float* mine = parts + static_cast<long long>(cluster) * PARTIAL_FLOATS;
  for (int e = thread; e < SLICE_ROWS * QUADS; e += THREADS) {
    const int r = rank * SLICE_ROWS + e / QUADS;
    reinterpret_cast<float4*>(mine)[rank * SLICE_ROWS * QUADS + e] =
        *reinterpret_cast<const float4*>(&shared.moments[r][e % QUADS * 4]);
  }
  if (rank == 0 && thread < SUMS_FLOATS / 4)
    reinterpret_cast<float4*>(mine + 2 * D * D)[thread] = reinterpret_cast<const float4*>(&shared.sums)[thread];
  __threadfence();
  if constexpr (CLUSTER > 1)
    cluster_barrier();
  else
    barrier_sync(0, THREADS);
  if (rank == 0 && thread == 0) {
    const bool last = atomicAdd(call.counters + item, 1) == clusters - 1;
    if (last) call.counters[item] = 0;
    __threadfence();
    shared.is_last = last;
  }
  unsigned last;
  if constexpr (CLUSTER > 1) {
    cluster_barrier();
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(last)
                 : "r"(remote_address(shared_address(&shared.is_last), 0))
                 : "memory");
  } else {
    barrier_sync(0, THREADS);
    last = shared.is_last;
  }
  if (last) {
    __threadfence();
    for (int e = thread; e < clusters * (SUMS_FLOATS / 4); e += THREADS)
      reinterpret_cast<float4*>(shared.parts)[e] = __ldcg(
          reinterpret_cast<const float4*>(parts + e / (SUMS_FLOATS / 4) * PARTIAL_FLOATS + 2 * D * D) +
          e % (SUMS_FLOATS / 4));
    const float m = merge_sums(shared, clusters, thread);
    for (int e = thread; e < SLICE_ROWS * QUADS; e += THREADS) {
      const int r = rank * SLICE_ROWS + e / QUADS;
      float4 sum = {0, 0, 0, 0};
#pragma unroll 4
      for (int c = 0; c < clusters; c++) {
        const float4 part =
            __ldcg(reinterpret_cast<const float4*>(parts + c * PARTIAL_FLOATS) + rank * SLICE_ROWS * QUADS + e);
        add_part(sum, part, rescaling(shared.parts[c].m, m), shared.parts[c], r, e % QUADS);
      }
      const unsigned at = shared_address(&shared.moments[r][e % QUADS * 4]);
      remote_store4(CLUSTER > 1 ? remote_address(at, 0) : at, sum);
    }
  }
  if constexpr (CLUSTER > 1)
    cluster_barrier();
  else
    barrier_sync(0, THREADS);
  return last && rank == 0;
}

// ---- roles

// Row and column of accumulator 4 j are those of a 16 x 8 product: `upper`, 8 j + 2 (thread % 4).
__device__ __forceinline__ int upper_row() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

// Moments about the origin before its last shift become moments about the new one.
__device__ __forceinline__ void move_moments(const Shared& shared, float (&c)[D], float rescale) {
  const int upper = upper_row();
  const float d1 = shared.moved_d1;
  const float sum[2] = {shared.moved_sums[upper], shared.moved_sums[upper + 8]};
  const float shift[2] = {shared.shift[upper], shared.shift[upper + 8]};
#pragma unroll
  for (int e = 0; e < D; e += 4) {
    const int column = 2 * e + threadIdx.x % 4 * 2;
    const float2 sums = *reinterpret_cast<const float2*>(&shared.moved_sums[column]);
    const float2 shifts = *reinterpret_cast<const float2*>(&shared.shift[column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      c[e + 2 * h] = rescale * (c[e + 2 * h] - sum[h] * shifts.x - shift[h] * (sums.x - d1 * shifts.x));
      c[e + 2 * h + 1] = rescale * (c[e + 2 * h + 1] - sum[h] * shifts.y - shift[h] * (sums.y - d1 * shifts.y));
    }
  }
}

// How many keys of a tile are a transform warp's.
__device__ __forceinline__ int keys_of(int warp, int tile, int keys) {
  return min(max(keys - tile * TILE - warp * WARP_KEYS, 0), WARP_KEYS);
}

// A matrix warp scores the keys of the transform warp of its number, while the tensor cores work on a tile.
__device__ __forceinline__ void score(Shared& shared, int tile, int keys, float scale_log2) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = tile % SLOTS, stage = tile % SCORE_STAGES;
  const int present = keys_of(warp, tile, keys);
  // Lanes 0 to 3 hold row 0 of the left operand, the query; the other rows are zero.
  const uint2* query = &shared.query[0][min(lane, 4)];
  mbarrier_wait(shared_address(&shared.raw_full[warp][slot]), tile / SLOTS & 1);
  float even[WARP_KEYS / 8][4] = {}, odd[WARP_KEYS / 8][4] = {};
  const unsigned at = shared_address(shared.raw[warp][slot]) + lane % 8 * RAW_PITCH + lane / 8 * 16;
#pragma unroll
  for (int step = 0; step < D / 32; step++) {
    const uint2 low = query[2 * step * 5], high = query[(2 * step + 1) * 5];
#pragma unroll
    for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
      unsigned k[4];
      load_matrices(k, at + eight * 8 * RAW_PITCH + step * 64);
      mma_upper_rows(even[eight], low.x, low.y, k[0], k[1]);
      mma_upper_rows(odd[eight], high.x, high.y, k[2], k[3]);
    }
  }
  // Lanes 0 to 3 have the scores of keys 2 lane and 2 lane + 1 of every eight.
  float m = MINUS_INFINITY;
#pragma unroll
  for (int eight = 0; eight < WARP_KEYS / 8; eight++) {
    const int key = eight * 8 + lane * 2;
    float2 s = {(even[eight][0] + odd[eight][0]) * scale_log2, (even[eight][1] + odd[eight][1]) * scale_log2};
    if (key >= present) s.x = MINUS_INFINITY;
    if (key + 1 >= present) s.y = MINUS_INFINITY;
    if (lane < 4) {
      *reinterpret_cast<float2*>(&shared.scores[stage][warp * WARP_KEYS + key]) = s;
      m = fmaxf(m, fmaxf(s.x, s.y));
    }
  }
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
  if (lane == 0) shared.maxima[stage][warp] = m;
  __syncwarp();
  if (lane == 0) mbarrier_arrive(shared_address(&shared.scores_full[stage]));
}

// A warpgroup accumulates X_k^T [X_k X_v] of its 64 key channels, then holds the trailing matrix of the
// factorisation.
__device__ __forceinline__ void matrix_role(Shared& shared, const lla::Call& call, const lla::Row& row, int item,
                                            int clusters, int keys, int tiles) {
  const float scale_log2 = call.scale * 1.4426950408889634f;
  const int warpgroup = threadIdx.x / 128;
  {
    float c[D];
#pragma unroll
    for (int e = 0; e < D; e++) c[e] = 0.0f;
    const unsigned x = shared_address(shared.x);
    for (int tile = 0; tile < min(SCORES_AHEAD, tiles); tile++) score(shared, tile, keys, scale_log2);
    for (int tile = 0; tile < tiles; tile++) {
      const int stage = tile % X_STAGES;
      mbarrier_wait(shared_address(&shared.x_full[stage]), tile / X_STAGES & 1);
      const float rescale = shared.rescale[stage];
      if (rescale != 1.0f) move_moments(shared, c, rescale);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < TILE / 16; step++) {
        const unsigned at = x + stage * X_STAGE + step * 16 * 128;
        const unsigned long long left = keys_outermost(at + warpgroup * X_BLOCK, X_BLOCK);
        if constexpr (D == 128) {
          // All 256 columns in one instruction do not compile: its accumulators and operands must fit the registers
          // a thread has before setmaxnreg.
          wgmma_m64n128(c, left, keys_outermost(at, X_BLOCK));
          wgmma_m64n128(c + D / 2, left, keys_outermost(at + 2 * X_BLOCK, X_BLOCK));
        } else {
          wgmma_m64n128(c, left, keys_outermost(at, X_BLOCK));
        }
      }
      wgmma_commit();
      if (tile + SCORES_AHEAD < tiles) score(shared, tile + SCORES_AHEAD, keys, scale_log2);
      // The products of the other warpgroup (D = 128) or block (D = 64) fill the pause until the next tile.
      wgmma_wait_all();
      if (threadIdx.x % 128 == 0) mbarrier_arrive(shared_address(&shared.x_empty[stage]));
    }
    barrier_sync(0, THREADS);
    const int upper = upper_row();
#pragma unroll
    for (int e = 0; e < D; e += 4) {
      const int column = 2 * e + threadIdx.x % 4 * 2;
      *reinterpret_cast<float2*>(&shared.moments[upper][column]) = {c[e], c[e + 1]};
      *reinterpret_cast<float2*>(&shared.moments[upper + 8][column]) = {c[e + 2], c[e + 3]};
    }
  }
  barrier_sync(0, THREADS);
  if (CLUSTER > 1 || clusters > 1) {
    if (!merge(shared, call, item, clusters, threadIdx.x)) return;
  }

  const int y = threadIdx.x / 8, x = threadIdx.x % 8;
  const float inverse_d1 = 1.0f / shared.sums.d1;
  const float ridge = row.ridge(call);
  float a[ROWS_PER_THREAD][PANELS];
#pragma unroll
  for (int i = 0; i < ROWS_PER_THREAD; i++) {
    const int r = i * Y + y;
    const float mean = shared.sums.x[r] * inverse_d1;
#pragma unroll
    for (int j = 0; j < PANELS; j++) {
      const int column = j * PANEL + x;
      a[i][j] = shared.moments[r][column] * inverse_d1 - mean * (shared.sums.x[column] * inverse_d1) +
                (r == column ? ridge : 0.0f);
    }
    shared.panel[r][x] = a[i][0];
  }
  barrier_arrive(PANEL_UPDATED, THREADS);

  // The panel threads factor the next panel while the rest of the matrix is updated by this one.
  for (int p = 0; p < PANELS - 1; p++) {
    barrier_sync(PANEL_FACTORED, THREADS);
    const float* factor = shared.factor[p];
    float4 left[ROWS_PER_THREAD][2];
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; i++) {
      const float4* from = reinterpret_cast<const float4*>(factor + (i * Y + y) * PANEL);
      left[i][0] = from[0], left[i][1] = from[1];
    }
#pragma unroll
    for (int j = 1; j < PANELS; j++) {
      if (j <= p) continue;
      const float4* from = reinterpret_cast<const float4*>(factor + (j * PANEL + x) * PANEL);
      const float4 right[2] = {from[0], from[1]};
#pragma unroll
      for (int i = 0; i < ROWS_PER_THREAD; i++) {
        if (i * Y + Y <= j * PANEL) continue;  // above the diagonal
        float updated = a[i][j];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          updated -= left[i][h].x * right[h].x;
          updated -= left[i][h].y * right[h].y;
          updated -= left[i][h].z * right[h].z;
          updated -= left[i][h].w * right[h].w;
        }
        a[i][j] = updated;
        if (j == p + 1) shared.panel[i * Y + y][x] = updated;
      }
      if (j == p + 1) barrier_arrive(PANEL_UPDATED, THREADS);
    }
  }
}

// A transform lane keeps 8 channels of K or V, for every key of its warp (D = 128) or every other (D = 64).
constexpr int CHUNKS = 2 * D / 8;
constexpr int KEYS_AT_ONCE = 32 / CHUNKS;
constexpr int PASSES = WARP_KEYS / KEYS_AT_ONCE;

__device__ __forceinline__ uint4 load_shared(unsigned address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
  return x;
}

__device__ __forceinline__ void store_shared(unsigned address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// The root of the weight of key `key + sub_key`, from the lane whose scores it is of.
__device__ __forceinline__ float root_of(const float (&roots)[SCORES], int key, int sub_key) {
  const float* pair = roots + key / 8 * 2;
  const int lane = key % 8 / 2;
  if (KEYS_AT_ONCE == 1) return __shfl_sync(~0u, pair[key % 2], lane);
  const float first = __shfl_sync(~0u, pair[0], lane), second = __shfl_sync(~0u, pair[1], lane);
  return sub_key ? second : first;
}

// A lane's part of the weights of its warp's keys; 0 in the lanes that hold none.
__device__ __forceinline__ float weights_of(const float (&roots)[SCORES], int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < SCORES; e++) sum += roots[e] * roots[e];
  return lane < 4 ? sum : 0.0f;
}

// Moves the origin to the weighted mean of the keys before this tile and in it, by all transform warps; the sums,
// relative to the old origin and maximum, follow. Rare: the maximum grew by a factor of 2^LAZY_LOG2.
__device__ __forceinline__ void recentre(Shared& shared, int warp, int lane, unsigned from,
                                         const float (&roots)[SCORES], float rescale, float (&sums)[8],
                                         float (&origin)[8], float& d1) {
  const int thread = warp * 32 + lane;
  const int sub_key = lane / CHUNKS;
  const int channel = lane % CHUNKS * 8;
  float warp_d1 = d1;
  warp_d1 += __shfl_xor_sync(~0u, warp_d1, 1);
  warp_d1 += __shfl_xor_sync(~0u, warp_d1, 2);
  warp_d1 = __shfl_sync(~0u, warp_d1, 0);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (KEYS_AT_ONCE == 2) sums[e] += __shfl_xor_sync(~0u, sums[e], 16);
    if (sub_key == 0) shared.staged[warp][channel + e] = sums[e];
  }
  if (lane == 0) shared.warp_d1[warp] = warp_d1;
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  float before = 0.0f, d1_before = 0.0f;
#pragma unroll
  for (int w = 0; w < TRANSFORM_WARPS; w++) {
    before += shared.staged[w][thread % (2 * D)];
    d1_before += shared.warp_d1[w];
  }
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  {
    float tile_sums[8] = {}, tile_d1 = weights_of(roots, lane);
    tile_d1 += __shfl_xor_sync(~0u, tile_d1, 1);
    tile_d1 += __shfl_xor_sync(~0u, tile_d1, 2);
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const float root = root_of(roots, pass * KEYS_AT_ONCE, sub_key);
      const uint4 raw = load_shared(from + pass * KEYS_AT_ONCE * RAW_PITCH);
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 x = widen(words[e]);
        tile_sums[2 * e] += root * root * (x.x - origin[2 * e]);
        tile_sums[2 * e + 1] += root * root * (x.y - origin[2 * e + 1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (KEYS_AT_ONCE == 2) tile_sums[e] += __shfl_xor_sync(~0u, tile_sums[e], 16);
      if (sub_key == 0) shared.staged[warp][channel + e] = tile_sums[e];
    }
    if (lane == 0) shared.warp_d1[warp] = tile_d1;
  }
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  if (thread < 2 * D) {
    float sum = rescale * before, weight = rescale * d1_before;
#pragma unroll
    for (int w = 0; w < TRANSFORM_WARPS; w++) {
      sum += shared.staged[w][thread];
      weight += shared.warp_d1[w];
    }
    const float shift = sum / weight;
    shared.shift[thread] = shift;
    shared.moved_sums[thread] = before;
    shared.sums.origin[thread] += shift;
    if (thread == 0) shared.moved_d1 = d1_before;
  }
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  d1 *= rescale;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float shift = shared.shift[channel + e];
    origin[e] += shift;
    sums[e] = sub_key == 0 ? rescale * (sums[e] - warp_d1 * shift) : 0.0f;
  }
}

// A transform warp copies its own keys of every tile and writes their rows of X; then it factors panels, solves and
// writes the output.
__device__ __forceinline__ void transform_role(Shared& shared, const lla::Call& call, const lla::Row& row, int item,
                                               int clusters, int begin, int keys, int tiles) {
  const int thread = threadIdx.x - MATRIX_THREADS;
  const int warp = thread / 32, lane = thread % 32;

  const int chunk = lane % CHUNKS, sub_key = lane / CHUNKS;
  const bool is_value = chunk >= CHUNKS / 2;
  const int channel = chunk % (CHUNKS / 2) * 8;

  const unsigned raw_full = shared_address(shared.raw_full[warp]);
  const unsigned x_chunk =
      shared_address(shared.x) + chunk / 8 * X_BLOCK + (warp * WARP_KEYS + sub_key) * 128 + ((chunk ^ sub_key) % 8 << 4);
  const unsigned raw_chunk = shared_address(shared.raw[warp]) + (is_value ? WARP_KEYS * RAW_PITCH : 0) +
                             sub_key * RAW_PITCH + channel * 2;

  // A lane copies what it will read: 16 bytes of each of its keys.
  const long long* stride = is_value ? call.v_stride : call.k_stride;
  const unsigned short* cache =
      half_pointer(is_value ? call.v : call.k) + row.kv_head * stride[2] + channel;
  auto copy = [&](int tile) {
    if (tile >= tiles) return;
    const int present = keys_of(warp, tile, keys), slot = tile % SLOTS;
    const int first = begin + tile * TILE + warp * WARP_KEYS + sub_key;
#if !PAGED
    const unsigned short* from = cache + row.batch * stride[0] + first * stride[1];
#endif
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      bool present_here = pass * KEYS_AT_ONCE + sub_key < present;
#if PAGED
      const unsigned short* from = cache;
      if (present_here) {
        const lla::Place place(call, row.batch, first + pass * KEYS_AT_ONCE);
        if (!place.valid) shared.bad_page = 1;
        present_here = place.valid;
        if (place.valid) from += place.outer * stride[0] + place.inner * stride[1];
      }
#endif
      copy_16_bytes(raw_chunk + slot * RAW_SLOT + pass * KEYS_AT_ONCE * RAW_PITCH, from, present_here);
#if !PAGED
      from += KEYS_AT_ONCE * stride[1];
#endif
    }
    arrive_after_copies(raw_full + slot * 8);
  };
  for (int tile = 0; tile < SLOTS; tile++) copy(tile);

  float origin[8] = {};

  float m = MINUS_INFINITY, d1 = 0.0f;
  float sums[8] = {};
  for (int tile = 0; tile < tiles; tile++) {
    const int stage = tile % X_STAGES, score_stage = tile % SCORE_STAGES;
    mbarrier_wait(shared_address(&shared.scores_full[score_stage]), tile / SCORE_STAGES & 1);
    float roots[SCORES];
#pragma unroll
    for (int e = 0; e < SCORES; e += 2) {
      const float2 s = *reinterpret_cast<const float2*>(
          &shared.scores[score_stage][warp * WARP_KEYS + e * 4 + lane % 4 * 2]);
      roots[e] = s.x, roots[e + 1] = s.y;
    }
    float tile_max = MINUS_INFINITY;
#pragma unroll
    for (int w = 0; w < TRANSFORM_WARPS; w += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.maxima[score_stage][w]);
      tile_max = fmaxf(tile_max, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
    }
    const bool grown = tile_max > m + LAZY_LOG2;
    const float rescale = grown ? exp2_approximate(m - tile_max) : 1.0f;
    if (grown) m = tile_max;
    const float shift = m == MINUS_INFINITY ? 0.0f : m;
#pragma unroll
    for (int e = 0; e < SCORES; e++) roots[e] = exp2_approximate(0.5f * (roots[e] - shift));
    const unsigned from = raw_chunk + tile % SLOTS * RAW_SLOT;
    if (grown) {
      // The moments follow this shift when this tile reaches them, so all before it must have.
      if (tile > 0)
        mbarrier_wait(shared_address(&shared.x_empty[(tile - 1) % X_STAGES]), (tile - 1) / X_STAGES & 1);
      recentre(shared, warp, lane, from, roots, rescale, sums, origin, d1);
    }
    d1 += weights_of(roots, lane);

    if (tile >= X_STAGES) mbarrier_wait(shared_address(&shared.x_empty[stage]), (tile / X_STAGES - 1) & 1);
    const unsigned to = x_chunk + stage * X_STAGE;
    // Loads of several keys before their stores: the compiler may not move a load across a store.
    constexpr int BATCH = 4;
#pragma unroll
    for (int first = 0; first < PASSES; first += BATCH) {
      uint4 raws[BATCH];
#pragma unroll
      for (int pass = 0; pass < BATCH; pass++)
        raws[pass] = load_shared(from + (first + pass) * KEYS_AT_ONCE * RAW_PITCH);
#pragma unroll
      for (int pass = 0; pass < BATCH; pass++) {
        const int key = (first + pass) * KEYS_AT_ONCE;
        const float root = root_of(roots, key, sub_key);
        const unsigned words[4] = {raws[pass].x, raws[pass].y, raws[pass].z, raws[pass].w};
        unsigned rounded[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float2 x = widen(words[e]);
          rounded[e] = round_pair((x.x - origin[2 * e]) * root, (x.y - origin[2 * e + 1]) * root);
          const float2 weighted = widen(rounded[e]);
          sums[2 * e] += root * weighted.x, sums[2 * e + 1] += root * weighted.y;
        }
        store_shared((to ^ key % 8 << 4) + key * 128, {rounded[0], rounded[1], rounded[2], rounded[3]});
      }
    }
    if (thread == 0) shared.rescale[stage] = rescale;
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.x_full[stage]));
    copy(tile + SLOTS);
  }
  barrier_sync(0, THREADS);

  // The tiles' memory is free; the warps' sums lie beside the moments.
  d1 += __shfl_xor_sync(~0u, d1, 1);
  d1 += __shfl_xor_sync(~0u, d1, 2);
  if (lane == 0) shared.warp_d1[warp] = d1;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (KEYS_AT_ONCE == 2) sums[e] += __shfl_xor_sync(~0u, sums[e], 16);
    if (sub_key == 0) shared.staged[warp][(is_value ? D : 0) + channel + e] = sums[e];
  }
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  for (int e = thread; e <= 2 * D; e += TRANSFORM_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < TRANSFORM_WARPS; w++) sum += e < 2 * D ? shared.staged[w][e] : shared.warp_d1[w];
    if (e < 2 * D)
      shared.sums.x[e] = sum;
    else
      shared.sums.d1 = shared.bad_page ? NOT_A_NUMBER : sum;
  }
  if (thread == 0) shared.sums.m = m;
  barrier_sync(0, THREADS);
  if (CLUSTER > 1 || clusters > 1) {
    if (!merge(shared, call, item, clusters, threadIdx.x)) return;
  }

  const float inverse_d1 = 1.0f / shared.sums.d1;
  // Thread r is row r of the panel. Its right-hand side, q - kbar, is carried along as one more row of the
  // factorisation: y = L^-1 (q - kbar) comes out without a forward substitution.
  const int r = thread;
  const unsigned short* q = half_pointer(call.q) + row.batch * call.q_stride[0] + row.position * call.q_stride[1] +
                            row.head * call.q_stride[2];
  float mean = 0.0f, right_side = 0.0f;
  if (r < D) {
    mean = shared.sums.x[r] * inverse_d1;
    right_side = widen(q[r]).x - shared.sums.origin[r] - mean;
    shared.right_side[r] = right_side;
  }
  float solved = 0.0f;
  for (int p = 0; p < PANELS; p++) {
    barrier_sync(PANEL_UPDATED, THREADS);
    const int top = p * PANEL;
    if (r >= top && r < D) {
      float diagonal[PANEL][PANEL], l[PANEL], y[PANEL];
#pragma unroll
      for (int i = 0; i < PANEL; i++) {
        const float4* from = reinterpret_cast<const float4*>(shared.panel[top + i]);
        const float4 low = from[0], high = i < 4 ? low : from[1];
        const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k <= i; k++) diagonal[i][k] = values[k];
      }
      {
        const float4* from = reinterpret_cast<const float4*>(shared.panel[r]);
        const float4 low = from[0], high = from[1];
        const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float4* side = reinterpret_cast<const float4*>(shared.right_side + top);
        const float4 side_low = side[0], side_high = side[1];
        const float sides[8] = {side_low.x,  side_low.y,  side_low.z,  side_low.w,
                                side_high.x, side_high.y, side_high.z, side_high.w};
#pragma unroll
        for (int k = 0; k < PANEL; k++) l[k] = values[k], y[k] = sides[k];
      }
#pragma unroll
      for (int k = 0; k < PANEL; k++) {
        // Not positive definite: NaN, which spreads to the whole output.
        const float inverse = diagonal[k][k] > 0.0f ? rsqrtf(diagonal[k][k]) : NOT_A_NUMBER;
        l[k] *= inverse;
        y[k] *= inverse;
        if (r == top + k) shared.pivot_inverse[r] = inverse, solved = y[k];
#pragma unroll
        for (int i = k + 1; i < PANEL; i++) diagonal[i][k] *= inverse;
#pragma unroll
        for (int i = k + 1; i < PANEL; i++) {
          l[i] -= l[k] * diagonal[i][k];
          y[i] -= y[k] * diagonal[i][k];
#pragma unroll
          for (int j = k + 1; j <= i; j++) diagonal[i][j] -= diagonal[i][k] * diagonal[j][k];
        }
      }
      float4* to = reinterpret_cast<float4*>(shared.factor[p] + r * PANEL);
      to[0] = {l[0], l[1], l[2], l[3]};
      to[1] = {l[4], l[5], l[6], l[7]};
#pragma unroll
      for (int k = 0; k < PANEL; k++) right_side -= l[k] * y[k];
    }
    if (p == PANELS - 1) break;
    // Panel threads are done reading right_side before its next rows are written: those of this panel and the
    // next are different words.
    if (r >= top + PANEL && r < top + 2 * PANEL) shared.right_side[r] = right_side;
    barrier_arrive(PANEL_FACTORED, THREADS);
  }

  // L^T u = y from the last panel up.
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
  for (int p = PANELS - 1; p >= 0; p--) {
    const int top = p * PANEL;
    if (r >= top && r < top + PANEL) shared.right_side[r] = solved;
    barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);
    float u[PANEL];
#pragma unroll
    for (int k = PANEL - 1; k >= 0; k--) {
      u[k] = shared.right_side[top + k];
#pragma unroll
      for (int i = k + 1; i < PANEL; i++) u[k] -= shared.factor[p][(top + i) * PANEL + k] * u[i];
      u[k] *= shared.pivot_inverse[top + k];
      if (r == top + k) shared.slope[r] = u[k];
    }
    if (r < top) {
#pragma unroll
      for (int k = 0; k < PANEL; k++) solved -= shared.factor[r / PANEL][(top + k) * PANEL + r % PANEL] * u[k];
    }
  }
  barrier_sync(TRANSFORM_BARRIER, TRANSFORM_THREADS);

  if (r < D) {
    float moment[4] = {}, along = 0.0f;
#pragma unroll 8
    for (int k = 0; k < D; k++) {
      moment[k % 4] += shared.moments[k][D + r] * shared.slope[k];
      along += shared.sums.x[k] * shared.slope[k];
    }
    const float mean_value = shared.sums.x[D + r] * inverse_d1;
    float o = shared.sums.origin[D + r] + mean_value +
              (moment[0] + moment[1] + moment[2] + moment[3]) * inverse_d1 - mean_value * (along * inverse_d1);
    if (!(row.ridge(call) > 0.0f)) o = NOT_A_NUMBER;
    unsigned short* out = static_cast<unsigned short*>(call.out) + row.batch * call.out_stride[0] +
                          row.position * call.out_stride[1] + row.head * call.out_stride[2];
    out[r] = round_one(o);
  }
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR) lla_kernel(const __grid_constant__ lla::Call call) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);

  const int item = blockIdx.x / call.splits, split = blockIdx.x % call.splits;
  const lla::Row row(call, item);
  // The clusters that take part: a short row is left to fewer.
  const int keys = row.keys();
  const int clusters = min(max((keys + MIN_SPLIT_KEYS * CLUSTER - 1) / (MIN_SPLIT_KEYS * CLUSTER), 1),
                           call.splits / CLUSTER);
  if (split >= clusters * CLUSTER) return;
  if (keys == 0) {
    if (split == 0 && threadIdx.x < D) {
      unsigned short* out = static_cast<unsigned short*>(call.out) + row.batch * call.out_stride[0] +
                            row.position * call.out_stride[1] + row.head * call.out_stride[2];
      out[threadIdx.x] = round_one(row.valid ? 0.0f : NOT_A_NUMBER);
    }
    return;
  }
  const int parts = clusters * CLUSTER;
  const int share = (keys + parts * TILE - 1) / (parts * TILE) * TILE;
  const int begin = row.first + min(split * share, keys);
  const int end = min(begin + share, row.end);
  const int tiles = (end - begin + TILE - 1) / TILE;

  if (threadIdx.x < D / 16 * 5) {
    const unsigned short* q = half_pointer(call.q) + row.batch * call.q_stride[0] + row.position * call.q_stride[1] +
                              row.head * call.q_stride[2];
    const int step = threadIdx.x / 5, lane = threadIdx.x % 5, at = step * 16 + lane * 2;
    uint2 pairs = {0, 0};
    if (lane < 4)
      pairs = {q[at] | static_cast<unsigned>(q[at + 1]) << 16, q[at + 8] | static_cast<unsigned>(q[at + 9]) << 16};
    shared.query[step][lane] = pairs;
  }
  if (threadIdx.x < 2 * D) shared.sums.origin[threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) {
    for (int w = 0; w < TRANSFORM_WARPS; w++)
      for (int s = 0; s < SLOTS; s++) mbarrier_init(shared_address(&shared.raw_full[w][s]), 32);
    for (int s = 0; s < X_STAGES; s++) {
      mbarrier_init(shared_address(&shared.x_full[s]), TRANSFORM_WARPS);
      mbarrier_init(shared_address(&shared.x_empty[s]), MATRIX_WARPGROUPS);
    }
    for (int s = 0; s < SCORE_STAGES; s++) mbarrier_init(shared_address(&shared.scores_full[s]), TRANSFORM_WARPS);
    shared.bad_page = 0;
    mbarrier_init_fence();
  }
  __syncthreads();

  // The accumulators of 128 channels need registers that the transform warps give up: 64 Ki in all.
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) < MATRIX_WARPGROUPS) {
    if constexpr (D == 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    matrix_role(shared, call, row, item, clusters, end - begin, tiles);
  } else {
    if constexpr (D == 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 96;");
    transform_role(shared, call, row, item, clusters, begin, end - begin, tiles);
  }
}
