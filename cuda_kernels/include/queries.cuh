#pragma once
// The query rows of an item on their way from global to shared memory: fetched into registers an item ahead, since a
// load that waits behind the streams of keys takes as long as those are deep.

#include "rows.cuh"

struct Queries {
  // Pieces of a row: vectors of 16 bytes, or single elements.
  static constexpr int PIECE = VECTORS ? 16 / int(sizeof(Element)) : 1, PROBE_PIECE = PROBE == 2 && VECTORS ? 4 : PIECE;
  static constexpr int OF_QUERIES = RECORDS * HEAD_DIM / PIECE, OF_PROBES = PROBE ? RECORDS * HEAD_DIM / PROBE_PIECE : 0;
  static constexpr int EACH = (OF_QUERIES + OF_PROBES + THREADS - 1) / THREADS;
  uint4 pieces[EACH];

  __device__ void fetch(const Problem& p, const Rows& rows) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const Piece x(threadIdx.x + i * THREADS);
      pieces[i] = make_uint4(0, 0, 0, 0);
      if (!x.exists || x.record.row >= rows.count) continue;
      if (!x.probe)
        pieces[i] = load(rows.at<const Element>(p.q, p.q_stride, x.record.h, x.record.row) + x.column);
      else if constexpr (PROBE == 2)
        pieces[i] = load(rows.at<const float>(p.r, p.r_stride, x.record.h, x.record.row) + x.column);
      else if constexpr (PROBE == 1)
        pieces[i] = load(rows.at<const Element>(p.r, p.r_stride, x.record.h, x.record.row) + x.column);
    }
  }

  // Clears what no piece is written to, once.
  __device__ static void clear(Element* to) {
    for (int i = threadIdx.x; i < QUERY_BYTES / int(sizeof(Element)); i += THREADS) to[i] = 0;
  }

  // Arrays of q, of r, and of what a float32 probe is more than its rounding, each of all rows.
  __device__ void deposit(Element* to) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const Piece x(threadIdx.x + i * THREADS);
      if (!x.exists) continue;
      Element* place = place_in(to, x.probe, x.record, x.column);
      const unsigned bits[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
      if (PROBE == 2 && x.probe) {
        if constexpr (!FLOAT) {
#pragma unroll
          for (int e = 0; e < PROBE_PIECE; e++) {
            const float r = __uint_as_float(bits[e]);
            place[e] = narrow<BFLOAT>(r);
            const float rest = r - widen<BFLOAT>(place[e]);
            // Infinity less itself is no number, and is in the rounding already.
            place_in(to, 2, x.record, x.column)[e] = rest == rest ? narrow<BFLOAT>(rest) : half_bits(0);
          }
        }
      } else if constexpr (VECTORS)
        *reinterpret_cast<uint4*>(place) = pieces[i];
      else if constexpr (FLOAT)
        *place = __uint_as_float(bits[0]);
      else
        *place = static_cast<half_bits>(bits[0]);
    }
  }

  // array: 0 q, 1 r, 2 what a float32 probe is more than its rounding.
  __device__ static Element* place_in(Element* to, int array, const Record& record, int column) {
    if constexpr (!WARPGROUPS) return to + array * QUERY_ARRAY + (record.h * ROWS + record.row) * QUERY_PITCH + column;
    const int run = record.h * (HEAD_BYTES / 128) + column / 64, line = 2 * record.row + (array > 0);
    const int at = array / 2 * QUERY_PART + run * OPERAND_BYTES + line * 128 + ((column / 8 % 8 ^ line % 8) * 16) + column % 8 * 2;
    return to + at / int(sizeof(Element));
  }

 private:
  struct Piece {
    bool exists, probe;
    int column;
    Record record;
    __device__ explicit Piece(int number)
        : exists(number < OF_QUERIES + OF_PROBES),
          probe(number >= OF_QUERIES),
          column(probe ? (number - OF_QUERIES) % (HEAD_DIM / PROBE_PIECE) * PROBE_PIECE : number % (HEAD_DIM / PIECE) * PIECE),
          record(probe ? (number - OF_QUERIES) / (HEAD_DIM / PROBE_PIECE) : number / (HEAD_DIM / PIECE)) {}
  };

  template <class T>
  __device__ static uint4 load(const T* from) {
    if constexpr (VECTORS)
      return __ldg(reinterpret_cast<const uint4*>(from));
    else if constexpr (sizeof(T) == 4)
      return make_uint4(__float_as_uint(__ldg(from)), 0, 0, 0);
    else
      return make_uint4(__ldg(from), 0, 0, 0);
  }
};
