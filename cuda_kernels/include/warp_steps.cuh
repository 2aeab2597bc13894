#pragma once
// The steps of a warp: none waits for another.

#include "float_tile.cuh"
#include "half_tile.cuh"
#include "ring.cuh"
#include "warp_weights.cuh"
#include "weigh.cuh"

template <bool F>
struct TileOf {
  typedef HalfTile type;
};
template <>
struct TileOf<true> {
  typedef FloatTile type;
};
typedef TileOf<FLOAT>::type Tile;

template <bool F>
__device__ __forceinline__ float to_float(Element x) {
  if constexpr (F)
    return x;
  else
    return widen<BFLOAT>(x);
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Adds what is not finite among the values of a step to the rows that see it, and puts zeros in its place: rows that
// do not see it then sum up the same numbers as if it had been finite.
template <class Sees>
__device__ __forceinline__ void take_not_finite(char* values, int lane, const float (&w)[HEADS][TILES][4], Sees sees, Accumulator& a) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int j = 0; j < STEP; j++) {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const float p1 = __shfl_sync(~0u, j < 8 ? w[h][n][0] : w[h][n][2], j % 8 * 4 + t);
        const float p2 = __shfl_sync(~0u, j < 8 ? w[h][n][1] : w[h][n][3], j % 8 * 4 + t);
        if (!sees(n, j)) continue;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
          const int at = (h * VALUE_COLUMNS + Tile::channel(i, g)) * int(sizeof(Element));
          const float v = to_float<FLOAT>(*reinterpret_cast<const Element*>(values + place_of<VALUE_BYTES>(j, at)));
          if (!is_finite(v)) a.O1[h][n][i] += p1 * v, a.O2[h][n][i] += p2 * v;
        }
      }
  }
  __syncwarp();
  constexpr int COLUMNS = VALUE_BYTES / int(sizeof(Element));
#pragma unroll 1
  for (int i = lane; i < STEP * COLUMNS; i += 32) {
    Element& x = *reinterpret_cast<Element*>(values + place_of<VALUE_BYTES>(i / COLUMNS, i % COLUMNS * int(sizeof(Element))));
    if (!is_finite(to_float<FLOAT>(x))) x = 0;
  }
  __syncwarp();
}

// Whether the values of a step, padding included, are all finite.
__device__ __forceinline__ bool all_finite(const char* values, int lane) {
  bool finite = true;
  constexpr int PIECES = VALUE_BYTES / 16;
  for (int i = lane; i < STEP * PIECES; i += 32) {
    const uint4 x = *reinterpret_cast<const uint4*>(values + place_of<VALUE_BYTES>(i / PIECES, i % PIECES * 16));
    for (unsigned word : {x.x, x.y, x.z, x.w}) {
      if constexpr (FLOAT)
        finite = finite && is_finite(__uint_as_float(word));
      else {
        constexpr unsigned LARGEST = BFLOAT ? 0x7f80u : 0x7c00u;
        finite = finite && (word & LARGEST) != LARGEST && (word >> 16 & LARGEST) != LARGEST;
      }
    }
  }
  return __all_sync(~0u, finite);
}

// The warp's steps from `step` on, up to `end`, of an item.
__device__ __forceinline__ void take_steps(const Problem& p, const Item& item, const Rows& rows, Ring& ring, Tile& tile, Accumulator& a,
                                           int& step, int end, WarpsTold& warps_told, char* shared, int lane) {
  const int g = lane / 4, t = lane % 4;
  // Where all rows see every key of a step nothing is masked; where they see the same keys nothing hidden is read.
  Range seen[TILES];
  Range by_all = item.keys, by_any = item.keys;
#pragma unroll
  for (int n = 0; n < TILES; n++) seen[n] = item.keys;
  if constexpr (VARIED) {
    by_all = {0, 0x7fffffff}, by_any = {0x7fffffff, 0};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const int row = n * 4 + row_of(t);
      if (row >= rows.count) continue;
      seen[n] = keys_of_row(p, item.batch, rows.query(row));
      by_all = {max(by_all.first, seen[n].first), min(by_all.end, seen[n].end)};
      by_any = {min(by_any.first, seen[n].first), max(by_any.end, seen[n].end)};
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      by_all.first = max(by_all.first, __shfl_xor_sync(~0u, by_all.first, mask));
      by_all.end = min(by_all.end, __shfl_xor_sync(~0u, by_all.end, mask));
      by_any.first = min(by_any.first, __shfl_xor_sync(~0u, by_any.first, mask));
      by_any.end = max(by_any.end, __shfl_xor_sync(~0u, by_any.end, mask));
    }
  }
  const bool alike = by_all.first == by_any.first && by_all.end == by_any.end;

  if (step >= end) warps_told.tell(shared, a, lane);
#pragma unroll 1
  for (; step < end; step += WARPS) {
    const int key = item.position(step);
    const bool masked = key < by_all.first || key + STEP > by_all.end;
    const auto sees = [&](int n, int j) { return key + j >= seen[n].first && key + j < seen[n].end; };
    float c[HEADS][TILES][4];
    tile.scores(ring.wait(), lane, c);
    ring.release(p);
    weigh(a, c, masked, [&](int n, int high) { return sees(n, g + 8 * high); }, p.scale_log2);
    if (step + WARPS >= end) warps_told.tell(shared, a, lane);
    char* values = ring.wait();
    if (masked) {
      clear_hidden(values, key, by_any, lane);
      ring.written = true;
      __syncwarp();
      if (VARIED && !alike && !all_finite(values, lane)) take_not_finite(values, lane, c, sees, a);
    }
    Tile::accumulate(values, lane, c, a.O1, a.O2);
    ring.release(p);
  }
}
