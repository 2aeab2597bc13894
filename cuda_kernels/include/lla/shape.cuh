#pragma once
// Sizes of the tuned kernel of local linear attention, its shared memory and its barriers.

#include "arrivals.cuh"
#include "block_meeting.cuh"
#include "delay.cuh"
#include "lla/inputs.cuh"
#include "lla/query.cuh"
#include "lla/rows.cuh"
#include "lla/scale.cuh"
#include "lla/vectors.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/numbers.cuh"
#include "ptx/opaque.cuh"
#include "ptx/relaxed.cuh"
#include "ptx/shared_memory.cuh"

constexpr int MATRIX_WARPGROUPS = D / 64;
constexpr int MATRIX_THREADS = 128 * MATRIX_WARPGROUPS, MATRIX_WARPS = MATRIX_THREADS / 32;
constexpr int ROW_BLOCKS = 1;  // of 64 rows of the moments, of a warpgroup
constexpr int TRANSFORM_WARPS = D == 64 ? 4 : 8;
constexpr int TRANSFORM_THREADS = 32 * TRANSFORM_WARPS;
constexpr int THREADS = MATRIX_THREADS + TRANSFORM_THREADS;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCKS_PER_MULTIPROCESSOR = D == 64 ? 2 : 1;
// Whether a block takes rows in turn, the next of which comes and becomes X while the one before is solved.
constexpr bool IN_TURN = ROWS_IN_TURN;
// Of a thread, of 256 for a matrix thread and a transform thread; and the same of conjugate gradients, while transform threads only
// share the row's sums with the rest.
constexpr int MATRIX_REGISTERS = IN_TURN ? 168 : 160, SOLVING_REGISTERS = IN_TURN ? MATRIX_REGISTERS : 208;
// Whether a row's blocks solve its system together, each with the moments of its own keys.
constexpr bool CONJUGATE_GRADIENTS = SOLVERS > 0, TOGETHER = SOLVERS > 1;
constexpr int SHARERS = TOGETHER ? SOLVERS : 1;
// And whether they add up the rows of a step's product, or send each other all of them.
constexpr bool ADDED_UP = STEPS_ADDED_UP;
static_assert(!ADDED_UP || TOGETHER);
// Or whether one of the blocks that share a row is given the moments of the others, and solves it by itself.
constexpr bool IS_GATHERED = GATHERED > 0;
static_assert(!IS_GATHERED || (SOLVERS == 1 && D == 64));
static_assert(!CONJUGATE_GRADIENTS || CLUSTER == 1);
// Below this many keys a block, merging costs more than it saves.
constexpr int MIN_SPLIT_KEYS = 512;

constexpr int TILE = 64;
// Groups of transform warps take the tiles in turn, so that one computes while another waits.
constexpr int GROUPS = 2;
constexpr int GROUP_WARPS = TRANSFORM_WARPS / GROUPS;
constexpr int WARP_KEYS = TILE / GROUP_WARPS;
static_assert(TRANSFORM_THREADS == 2 * D, "a transform thread for every column of the sums");

// A slot of the ring holds a tile in runs of 64 channels, in them a row of 128 bytes for every key, whose pieces of 16
// are swapped by the key's number: the runs of the values, then those of the keys. X takes the place of what it is made
// from. Both are operands of the matrix units as they lie; all values and the keys up to a warpgroup's adjoin.
constexpr int SLOTS = 6;
constexpr int RUNS = D / 64;       // of keys, or of values
constexpr int RUN = TILE * 128;    // all in bytes
constexpr int SLOT = 2 * RUNS * RUN;
constexpr int BOXES = TILE / BOX;  // of a run
static_assert(BOX % 8 == 0 && TILE % BOX == 0 && SLOTS * BOXES <= 32, "a lane brings a box");
// What conjugate gradients need lies in a slot, or from one on: where rows are taken in turn in the last, so that the tiles of the next one
// come to the others.
constexpr int SOLVING_SLOT = IN_TURN ? SLOTS - 1 : 1;
// Tiles of a row that come, and become X, while the row before is solved.
constexpr int EARLY_TILES = SLOTS - 1;

// Where run `run` of the keys, or of the values, lies in a slot, and what columns of X those at `place` are.
__device__ __forceinline__ constexpr int place_of_run(bool is_value, int run) { return is_value ? run : RUNS + run; }
__device__ __forceinline__ constexpr int column_of_place(int place) { return (place + RUNS) % (2 * RUNS) * 64; }

// A weight may grow to 2^8 before the moments are rescaled.
constexpr float LAZY_LOG2 = 8.0f;
// Scores run ahead of X, so that no group waits for them: with heads of 128 by two tiles where conjugate gradients have a row to
// themselves, which memory and power bound, else by three (measured on an H200). Those of the last tile with X may still be read.
constexpr int SCORES_AHEAD = D == 128 && CONJUGATE_GRADIENTS && !TOGETHER ? 2 : 3;
constexpr int SCORE_STAGES = 8;
static_assert(SCORE_STAGES > SCORES_AHEAD + 1 && SCORE_STAGES > EARLY_TILES);
static_assert(SLOTS > SCORES_AHEAD + 1, "a tile is brought when the one in its slot is done with");

// In floats. Pairs of adjacent columns of 8 rows, as the tensor cores have them, fall on different banks.
constexpr int MOMENT_PITCH = 2 * D + 8;
constexpr int INVERSE_PITCH = 24;

// What is known of some keys beside their centred moments, in the order of a partial.
struct Sums {
  float mean[2 * D];  // of keys and values
  float d1, m, unused[2];
};
constexpr int SUMS_FLOATS = sizeof(Sums) / 4;
// Of rows in turn two, the row's and the next one's.
constexpr int QUERIES = IN_TURN ? 2 : 1;
// Accumulators of the values' moments that a thread leaves in shared memory while it solves a row, for want of registers.
constexpr int PARKED = IN_TURN ? D / 4 : D == 64 && SHARERS == 1 && !IS_GATHERED ? 16 : 0;
constexpr int PARTIAL_FLOATS = 2 * D * D + SUMS_FLOATS;
constexpr int MAX_PARTS = 16;  // that are merged at a time
static_assert(CLUSTER <= MAX_PARTS);

// Of conjugate gradients. The right-hand side and how far the mean of the block's keys is from their origin are found by the transform
// warps where blocks share a row's steps, or a block takes rows in turn.
struct Solving {
  alignas(16) LyingVector right, shift;
  // What comes of two steps in turn.
  alignas(16) LyingVector product[2];
  // The vector that the moments are multiplied by, of each warp.
  alignas(16) LyingVector vectors[MATRIX_WARPS];
#if SOLVERS > 1
  // How far the block's mean of the keys is from the row's; the block's share of the row's weight, and one over that weight, relative to
  // the block's maximum.
  alignas(16) LyingVector apart;
  float share, inverse_weight;
  unsigned long long added[2][ADDED_UP ? D : 1];  // at the places of added.cuh, before a step
#else
  // Its inner product with what comes of it, of two steps in turn.
  alignas(16) float curvatures[2][MATRIX_WARPS];
#endif
#if ROWS_IN_TURN
  // The row's ridge and output, the factor from products of X to units of keys and values, and which of the block's it is.
  half_bits* output;
  float factor, ridge;
  int number;
  unsigned turn;
#endif
};

// How two parts become one: their shares of both's weight, and the product of these.
struct Shares {
  float first, second, distance;
};

struct Shared {
  union {
    alignas(1024) unsigned char ring[SLOTS][SLOT];
    struct {
      // Centred: sums of w (k - kbar) (k - kbar | v - vbar); of a whole row their means, and the ridge on the diagonal.
      alignas(16) float moments[D][MOMENT_PITCH];
      union {
        Sums parts[MAX_PARTS];
        alignas(16) float inverse[IN_TURN ? D / 16 : 2][16][INVERSE_PITCH];  // the last two steps' M, or of all steps
      };
    };
    // Of conjugate gradients: the block of the moments below the diagonal and, of rows in turn, what of a row's moments waits for its slope.
    struct {
#if GATHERED
      alignas(16) float4 values[GATHERED][D / 8][MATRIX_THREADS];  // moments of the values of each of the row's blocks; then all, in the first
#else
      unsigned char tiles[SOLVING_SLOT][SLOT];
#endif
      union {
        float below[D == 128 ? 64 : 1][68];
        alignas(16) float4 parked[PARKED > 0 ? PARKED / 4 : 1][MATRIX_THREADS];
      };
#if !ROWS_IN_TURN
      Solving solving;
#endif
#if GATHERED
      // How far means are from one another, of each pair of blocks and of both pairs; and how those become one.
      alignas(16) float apart[3][2 * D];
      Shares joins[3];
      // How far the mean of each of the row's blocks is from the row's; and its share of the row's weight.
      alignas(16) float apart_from_row[GATHERED][2 * D];
      float shares[GATHERED];
      // What the transform warps have added up of the keys: their moments, and the rest.
      alignas(16) float4 of_others[D / 8][MATRIX_THREADS];
      float mean_of_others[2 * D], d1_of_others, m_of_others;
#endif
    };
  };
#if ROWS_IN_TURN
  Solving solving;
#endif
  alignas(1024) unsigned char query[QUERIES * RUNS][VECTOR];
  union {
    // Of the groups and then the warps, or of the warps alone.
    alignas(16) float staged[GROUPS + TRANSFORM_WARPS][2 * D];
    alignas(16) float output[WARPS][D];
  };
  // The last two shifts of the origin, in turn, with the sums of the rounded w (k - k0) and w (v - v0) before each,
  // scaled as X, and their weight.
  struct {
    alignas(16) float sums[2 * D];
    alignas(16) float shift[2 * D];
    float d1;
  } moved[2];
  alignas(16) float origin[2 * D];
  alignas(16) float sums[2 * D];
  alignas(16) float slope[D];  // the right-hand side, before the last step
  alignas(16) Sums own;    // of the block's keys
#if !ROWS_IN_TURN
  alignas(16) Sums total;  // of all that were merged
#endif
  alignas(16) float scores[SCORE_STAGES][TILE];
  float warp_d1[2][TRANSFORM_WARPS];
  float rescale[SLOTS];
  // Of keys and of values: one over what X is scaled by, a power of two, and the largest that decides it, as bits.
  float inverse_scale[2];
  unsigned largest[2];
  int begin, first, end;  // of the first tile, and of the block's keys
  int batch, kv_head;
  unsigned out_of_range;  // X was, in this pass
  unsigned exact;         // the scale is that of the largest number of all
  unsigned is_last;
  unsigned solved_by_steps;
#if ROWS_IN_TURN
  // Of rows in turn: the one whose tiles are taken, or -1 after the last, which it is of the block's, and how many were before; the next
  // one; which of the block's steps have not solved, by their numbers; and whether those are taken once more, to be factored.
  int item, number;
  unsigned turn;
  struct {
    int item, number, begin, first, end, batch, kv_head;
  } next;
  unsigned unsolved, by_factor;
#endif
  unsigned tag, blocks;  // of the row's mail, and that share the row
#if GATHERED
  // The block of the row that solves it, or NOT_CHOSEN; which of them may, as it came; and whether this one has said whether it may.
  alignas(16) Word16 may_solve[GATHERED];
  int chosen;
  bool has_said;
  unsigned bits[GATHERED], bits_of_choice[GATHERED];  // of what each of them gives, and of whether it may solve, that tell it from what was before
  unsigned long long launch;                          // how many there were, with this one
  unsigned is_proposed;                               // whether there is a slope, and not an end without one
  unsigned decided[2];                                // what came of it, of two in turn
#endif
  unsigned bad_page;
  alignas(8) unsigned long long raw_full[SLOTS];
  unsigned long long x_full[SLOTS];
  unsigned long long x_empty[SLOTS];
  unsigned long long scores_full[SCORE_STAGES];
#ifdef FOR_RACECHECK
  unsigned long long moved_by_all[2];
#endif
  // Of all warps: in any roles; in the solver, after a block's factor and after its panel.
  unsigned long long met, solved, panelled;
  unsigned long long given;   // the columns that the first matrix warpgroup lacks
#if GATHERED
  unsigned long long proposed;  // a slope is in the first of solving.vectors, or none will be
  unsigned long long weighed;   // what the transform warps have added up of the keys has its weight and mean
  unsigned long long paired;    // and what the matrix warps have; the block's own moments of the values are there
#endif
#if ROWS_IN_TURN
  // Of rows in turn: the first matrix warpgroup has those columns; the next row's first tiles are asked for; and one is solved.
  unsigned long long taken, begun, ended;
#endif
  unsigned long long synced;  // of BlockMeeting
};
static_assert(sizeof(Shared) == SHARED_BYTES, "lla.py asks for another size");
static_assert(sizeof(Shared) <= 227 * 1024 / BLOCKS_PER_MULTIPROCESSOR - 1024 * (BLOCKS_PER_MULTIPROCESSOR - 1));

// Hardware barriers; 0 is the block's.
enum : int { MATRIX = 1, TRANSFORM = 2, FIRST_MATRIX = 3, LAST_MATRIX = 4 };

__device__ __forceinline__ void arrive_as_warp(const unsigned long long& barrier, int lane) {
  __syncwarp();
  if (lane < OF_WARP) mbarrier_arrive(shared_address(&barrier));
}

// Warps wait for each other at different places of the program; hardware barriers are for one place.
__device__ __forceinline__ void come(const unsigned long long& barrier) { arrive_as_warp(barrier, thread_index() % 32); }
__device__ __forceinline__ void meet(const unsigned long long& barrier, unsigned parity) {
  come(barrier);
  mbarrier_wait(shared_address(&barrier), parity);
}
