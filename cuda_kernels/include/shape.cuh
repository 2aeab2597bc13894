#pragma once
// The compile-time shape of a kernel, from the launcher's definitions, and its plan of shared memory.
//
//   ELEMENT      0 bfloat16, 1 float16, 2 float32
//   HEAD_DIM     channels of queries and keys        VALUE_DIM  channels of values
//   GROUP        query heads of a key head
//   PROBE        0 none, 1 in the element type, 2 float32 beside half-precision elements
//   HEADS        key heads that lie side by side in memory and share a row of the ring
//   TILES        groups of four query rows that a block takes at a time
//   QUERIES      query rows of a group in use: 1, 2 or 4; 4 where TILES > 1
//   WARPS, BLOCKS  warps of a block, blocks a multiprocessor is to hold
//   WARPGROUPS   1: the warps of a warpgroup take a step together, and multiply by wgmma (sm_90a)
//   SLOTS        slots of a ring
//   GRID         how blocks share the work: 0 equal ranges of all keys; 1 every item cut alike, one cut a block
//                (x: cut, y: unit and block of rows, z: batch row); 2 a block computes whole rows (x: item)
//   CLUSTER      blocks of a cluster, which merge through distributed shared memory; a divisor of the cuts
//   TOGETHER     1: the blocks that share an item all run at once, and send each other their parts (parcels.cuh)
//   MOST_ITEMS   that a launch of such blocks has
//   PINNED       1: ranges are split after split_steps steps of an item, whatever the batch
//   INDEXED      1: lengths or paddings of the batch rows are read on the device
//   PACKED       1: sequences are packed between cu_seqlens
//   VARIED       1: rows of an item may see different keys
//   PAGE_SIZE    positions of a page, 0 where the caches are not paged
//   SHARED       bytes of shared memory that the launcher asks for
//   PROBLEM_BYTES  size of the structure that it passes
//   VECTORS      1: rows of q and r are whole vectors of 16 aligned bytes
//   BOX          keys that the copy engine brings at a time: 8 or 16; of a warpgroup's step, all or those of a page
//   READ_ONCE    1: each key is read once, and more of them than the second-level cache holds
// and from the kernel: BOXES 1 where the copy engine brings the keys, ALIGNED 1 where 16 bytes can be copied at a time.

#include "ptx/numbers.cuh"

constexpr bool FLOAT = ELEMENT == 2;
constexpr bool BFLOAT = ELEMENT == 0;
constexpr bool PAGED = PAGE_SIZE > 0;
constexpr int PAGE = PAGED ? PAGE_SIZE : 1;
constexpr int STEP_WARPS = WARPGROUPS ? 4 : 1;  // that take a step together, from one ring, and have their sums together
constexpr int RINGS = WARPS / STEP_WARPS;
constexpr int STEP = 16 * STEP_WARPS;  // keys that they take at a time
constexpr bool WHOLE = GRID == 2;
constexpr bool SINGLE = GRID != 0;  // whether a block has one item alone

__host__ __device__ constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <bool F>
struct ElementOf {
  typedef half_bits type;
};
template <>
struct ElementOf<true> {
  typedef float type;
};
typedef ElementOf<FLOAT>::type Element;

constexpr int KEY_COLUMNS = round_up(HEAD_DIM, FLOAT ? 4 : 16);
constexpr int VALUE_COLUMNS = round_up(VALUE_DIM, FLOAT ? 32 : 16);
constexpr int HEAD_BYTES = KEY_COLUMNS * int(sizeof(Element));
constexpr int KEY_BYTES = HEADS * HEAD_BYTES;
constexpr int VALUE_BYTES = HEADS * VALUE_COLUMNS * int(sizeof(Element));
constexpr int ROW_BYTES = KEY_BYTES > VALUE_BYTES ? KEY_BYTES : VALUE_BYTES;
// An odd multiple of 16 bytes between rows: eight rows of a matrix then fall into eight different bank groups.
constexpr int PITCH = ROW_BYTES / 16 % 2 ? ROW_BYTES : ROW_BYTES + 16;
constexpr int SLOT_BYTES = STEP * (BOXES ? ROW_BYTES : PITCH);
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 4 * TILES;                   // query rows of a key head that a block takes at a time
constexpr int CHANNELS = VALUE_COLUMNS / 8 / STEP_WARPS;  // channels of a query row that one lane accumulates
constexpr int RECORDS = HEADS * TILES * QUERIES;  // rows of a partial result
constexpr int QUERY_PITCH = KEY_COLUMNS + 16 / int(sizeof(Element));  // elements between query rows in shared memory
// Elements between the arrays of query rows; half of the banks away, since rows of q and of r are read together.
constexpr int QUERY_ARRAY = round_up(HEADS * ROWS * QUERY_PITCH - 64 / int(sizeof(Element)), 128 / int(sizeof(Element))) + 64 / int(sizeof(Element));
// bfloat16 keeps 8 bits of a weight: what it leaves is multiplied with the values too. A product has eight columns, two a
// query row; where half of them are free the rests of the weights go there, and cost nothing.
constexpr bool WITH_RESTS = BFLOAT && TILES == 1, RESTS_ASIDE = WITH_RESTS && QUERIES <= 2;
// The query row, of four, whose numbers a lane of column pair t has.
__device__ __forceinline__ int row_of(int t) { return RESTS_ASIDE ? t % QUERIES : t; }
constexpr int SLICE = VALUE_DIM / CLUSTER;  // channels that a block of a cluster merges

// Shared memory, in bytes from its start.
constexpr int RING_BYTES = SLOTS * SLOT_BYTES;
constexpr int RING_AT = 0;
// A warpgroup's weights and queries are operands in shared memory: rows of 128 bytes, two a query row. Weights of one step are
// written while those of the step before may still be read.
constexpr int OPERAND_BYTES = 8 * TILES * 128;
constexpr int WEIGHTS_AT = RINGS * RING_BYTES;
constexpr int WEIGHTS_BYTES = WARPGROUPS ? 2 * HEADS * OPERAND_BYTES : 0;  // of a ring
constexpr int BESIDE_RINGS = WEIGHTS_AT + RINGS * WEIGHTS_BYTES;
// Where warps hand their sums over, how many channels at a time, and how many bytes apart: where their rings are, once those have
// run out; where another item follows, beside them. So do 16 rows that one block merges, whose kernel is as large as may be.
// Warpgroups have room beside them where their weights were.
template <bool IN_RINGS>
struct Exchange {
  static constexpr int BESIDE = WARPGROUPS ? WEIGHTS_BYTES / (8 * RECORDS) : RECORDS < 4 ? 128 / RECORDS : 32;
  static constexpr int COPIES = IN_RINGS && RESTS_ASIDE ? 2 : 1;  // of a sum: that of rests is handed over by itself
  static constexpr int HANDED = IN_RINGS ? RING_BYTES / (8 * RECORDS * COPIES) / 32 * 32 : BESIDE;
  static constexpr int CHANNELS = HANDED < round_up(VALUE_COLUMNS, 32) ? HANDED : round_up(VALUE_COLUMNS, 32);
  static constexpr int AT = IN_RINGS ? RING_AT : WARPGROUPS ? WEIGHTS_AT : RING_AT + WARPS * RING_BYTES;
  static constexpr int PITCH = IN_RINGS ? RING_BYTES : WARPGROUPS ? WEIGHTS_BYTES : (RECORDS * CHANNELS > 128 ? RECORDS * CHANNELS * 8 : 1024);
};
constexpr bool LAST_IN_RINGS = SINGLE || ((TOGETHER || TILES < 4) && Exchange<true>::CHANNELS > Exchange<false>::CHANNELS);
constexpr int EXCHANGE_AT = Exchange<SINGLE>::AT;
constexpr int STATISTICS_AT = SINGLE || WARPGROUPS ? BESIDE_RINGS : EXCHANGE_AT + WARPS * Exchange<false>::PITCH;
constexpr int REFERENCES_AT = STATISTICS_AT + WARPS * RECORDS * 16;
constexpr int FACTORS_AT = REFERENCES_AT + round_up(WARPS * RECORDS * 4, 16);
constexpr int TOTALS_AT = FACTORS_AT + round_up(WARPS * RECORDS * 8, 16);
constexpr int RESULT_AT = TOTALS_AT + RECORDS * 16;
constexpr int QUERIES_AT = round_up(RESULT_AT + (CLUSTER > 1 ? RECORDS * (16 + 8 * VALUE_DIM) : 0), WARPGROUPS ? 1024 : 1);
constexpr int QUERY_PART = HEADS * (HEAD_BYTES / 128) * OPERAND_BYTES;  // bytes of a warpgroup's operand of queries and probes
constexpr int QUERY_BYTES = WARPGROUPS ? (PROBE == 2 ? 2 : 1) * QUERY_PART : (1 + PROBE) * QUERY_ARRAY * int(sizeof(Element));
constexpr int BARRIERS_AT = QUERIES_AT + QUERY_BYTES;
constexpr int SHARED_BYTES = BARRIERS_AT + RINGS * SLOTS * 8;

static_assert(SHARED_BYTES == SHARED, "the launcher counts shared memory otherwise");
static_assert((WARPS & (WARPS - 1)) == 0, "warps are reduced by halves");
static_assert(Exchange<SINGLE>::CHANNELS >= 32 && RINGS * Exchange<SINGLE>::PITCH >= THREADS * 32, "the exchange is too small");
static_assert(CLUSTER == 1 || (GRID == 1 && VALUE_DIM % CLUSTER == 0), "blocks of a cluster merge as many channels each");
static_assert(!TOGETHER || (GRID != 2 && !PINNED && CLUSTER == 1), "blocks that send parcels share items");
static_assert(HEADS == 1 || (KEY_COLUMNS == HEAD_DIM && VALUE_COLUMNS == VALUE_DIM), "rows of several heads have no padding");
static_assert(TILES == 1 || QUERIES == 4, "only a single group of rows may be partly used");
static_assert(PITCH / 16 % 2 == 1, "the pitch must be an odd multiple of 16 bytes");
static_assert(!BOXES || (HEADS * HEAD_DIM * sizeof(Element) % 128 == 0 && HEADS * VALUE_DIM * sizeof(Element) % 128 == 0),
              "a box is made of runs of 128 bytes");
static_assert(!BOXES || PAGE_SIZE % (WARPGROUPS ? BOX : STEP) == 0, "a box must not cross pages");
static_assert(!WARPGROUPS || (BOXES && STEP % BOX == 0 && !VARIED && !PINNED && HEAD_DIM % 64 == 0 && VALUE_DIM % 64 == 0),
              "a warpgroup takes whole boxes, of which all rows see the same keys");

// Where byte `at` of row `row` of a slot lies. The copy engine lays a box out by runs of 128 bytes of its rows, and swaps the 16-byte pieces of a row by its number, which spreads a column over all banks. Runs of a box's rows follow one another.
template <int BYTES>
__device__ __forceinline__ int place_of(int row, int at) {
  if constexpr (!BOXES) return row * PITCH + at;
  constexpr int LAID = WARPGROUPS ? STEP : BOX;  // rows whose runs lie together
  return row / LAID * (LAID * BYTES) + at / 128 * (LAID * 128) + row % LAID * 128 + ((at / 16 % 8 ^ row % 8) * 16) + at % 16;
}

// Where the lane's row of a matrix load begins in columns 16 i and on, `half` naming the first or second 8 of them.
template <int BYTES>
struct MatrixRow {
  unsigned base;
  __device__ MatrixRow(unsigned slot, int row, int half) : base(slot + place_of<BYTES>(row, half * 16)) {}
  __device__ unsigned at(int i) const { return BOXES ? (base ^ (i % 4 * 32)) + i / 4 * (BOX * 128) : base + i * 32; }
};
