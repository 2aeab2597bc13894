#pragma once
// Which of a row's two or four blocks solves it, where one is given the moments of the others. Two that solve on one multiprocessor take half
// as long again as one, and the last row is what all wait for: so of two blocks there only one may, the one in its first place if its
// number in its row is even, else the other. Rows begin every two or four blocks and multiprocessors are filled in their order, so that
// half of a row's blocks may. The first of them solves it; where none may, the row's first.
//
// What blocks have to tell each other for that is on its way while keys come: nothing waits for it where a block has some tiles.

#include "lla/shape.cuh"
#include "ptx/copy.cuh"
#include "ptx/multiprocessor.cuh"
#include "ptx/relaxed.cuh"

constexpr int PART_WORDS = D / 8;  // of a thread's accumulators of keys, or of values
constexpr int NOT_CHOSEN = -1;

// What a block of a row gives whichever of them solves it. The last bit of each says whether it is there, 0 and 1 in turn.
struct alignas(128) Given {
  Word16 known[2 * D];                            // weight, maximum and mean of each column
  Word16 moments[2][PART_WORDS][MATRIX_THREADS];  // of keys and of values
  // Whether the block may solve; and the bits that were last used, of all above and, twice, of this.
  alignas(16) unsigned long long may_solve, last;
};
static_assert(sizeof(Given) * GATHERED == MAIL_BYTES, "lla.py makes room for another size");

// Before what all rows' blocks give: launches so far, and of each multiprocessor the launch and the block that had its first place last.
struct Places {
  alignas(16) unsigned long long first_on[510];
  unsigned long long launches;
};
static_assert(sizeof(Places) == 4096, "lla.py makes room for another size");
constexpr int MOST_MULTIPROCESSORS = sizeof(Places::first_on) / sizeof(Places::first_on[0]);

__device__ __forceinline__ Places& places(const lla::Call& call) { return *static_cast<Places*>(call.mail); }
__device__ __forceinline__ Given* given_of_row(const lla::Call& call) {
  return reinterpret_cast<Given*>(&places(call) + 1) + item_of_block(call) * GATHERED;
}

// By a matrix warp that neither copies nor speaks for the others.
constexpr int CHOOSING_WARP = MATRIX_WARPS - 1;

// What a lane is to know of the uses before: of the row's block of its number, and the launches.
__device__ __forceinline__ unsigned long long ask_last_use(const lla::Call& call, int lane, int blocks) {
  const unsigned long long* from = lane < blocks ? &given_of_row(call)[lane].last : &places(call).launches;
  return lane <= GATHERED ? load_relaxed(from) : 0;
}

__device__ __forceinline__ void say_whether_it_may_solve(Shared& shared, const lla::Call& call, bool may) {
  const int own = block_of_row(call);
  if (thread_index() % 32 == 0) {
    store_relaxed(&given_of_row(call)[own].may_solve, 2ull * may + shared.bits_of_choice[own]);
    shared.has_said = true;
  }
  __syncwarp();
}

// Read by all lanes before one writes it.
__device__ __forceinline__ bool has_said(const Shared& shared) {
  const bool said = shared.has_said;
  __syncwarp();
  return said;
}

// Whether a block beside one that has the first place may solve. first: what that one has left there, if there is one.
__device__ __forceinline__ bool may_beside(const Shared& shared, const lla::Call& call, unsigned long long first) {
  return (first / GATHERED == shared.launch ? first : block_of_row(call) + 1) % 2 != 0;
}

// As a block begins. last: what was asked for.
__device__ __forceinline__ void begin_choice(Shared& shared, const lla::Call& call, unsigned long long last) {
  const int lane = thread_index() % 32, own = block_of_row(call);
  const unsigned long long launch = __shfl_sync(~0u, last, GATHERED) + 1;
  if (lane < GATHERED) shared.bits[lane] = unsigned(last) & 1 ^ 1, shared.bits_of_choice[lane] = unsigned(last) >> 1 & 1 ^ 1;
  if (lane == 0) shared.launch = launch, shared.chosen = NOT_CHOSEN, shared.has_said = false;
  const unsigned here = multiprocessor();
  // Of a device that has more nobody looks who is beside.
  if (here < MOST_MULTIPROCESSORS) {
    if (place_on_multiprocessor(WARPS) > 0) return;
    if (lane == 0) store_relaxed(&places(call).first_on[here], launch * GATHERED + own);
  }
  __syncwarp();
  say_whether_it_may_solve(shared, call, own % 2 == 0);
}

__device__ __forceinline__ bool has_come(const Shared& shared, int block, unsigned long long may_solve) {
  return ((unsigned(may_solve) ^ shared.bits_of_choice[block]) & 1) == 0;
}

__device__ __forceinline__ int choose(const Shared& shared, bool may) {
  const unsigned who = __ballot_sync(~0u, may);
  return who ? __ffs(who) - 1 : 0;
}

// When a tile is multiplied, by its number: the block in the second place asks who has the first, and says whether it may solve; then all
// ask who may, and the first of them is chosen if all have said it.
constexpr int ASKS_BESIDE = 1, SAYS = 2, ASKS_ALL = 4, CHOOSES = 6;
__device__ __forceinline__ void go_on_to_choose(Shared& shared, const lla::Call& call, unsigned tile) {
  const int lane = thread_index() % 32, blocks = shared.blocks;
  const unsigned here = multiprocessor();
  if (tile == ASKS_BESIDE && !has_said(shared)) {
    if (lane == 0) copy_16(shared_address(&shared.may_solve[0]), &places(call).first_on[here & ~1u]);
    copy_commit();
  } else if (tile == SAYS && !has_said(shared)) {
    copy_wait<0>();
    __syncwarp();
    const Word16 both = shared.may_solve[0];
    __syncwarp();
    say_whether_it_may_solve(shared, call, may_beside(shared, call, here % 2 ? both.second : both.first));
  } else if (tile == ASKS_ALL) {
    if (lane < blocks) copy_16(shared_address(&shared.may_solve[lane]), &given_of_row(call)[lane].may_solve);
    copy_commit();
  } else if (tile == CHOOSES) {
    copy_wait<0>();
    __syncwarp();
    const bool exists = lane < blocks;
    const unsigned long long found = exists ? shared.may_solve[lane].first : 0;
    const bool all = __all_sync(~0u, !exists || has_come(shared, lane, found));
    const int chosen = choose(shared, exists && found / 2);
    if (lane == 0 && all) shared.chosen = chosen;
  }
}

// The block of the row that solves it, after the products; by whole warps.
__device__ __forceinline__ int solving_block(Shared& shared, const lla::Call& call) {
  if (const int chosen = shared.chosen; chosen != NOT_CHOSEN) return chosen;
  // Few tiles, or one of the blocks began late.
  const int lane = thread_index() % 32;
  if (thread_index() / 32 == CHOOSING_WARP && !has_said(shared))
    say_whether_it_may_solve(shared, call, may_beside(shared, call, load_relaxed(&places(call).first_on[multiprocessor()])));
  const bool exists = lane < shared.blocks;
  unsigned long long found = 0;
  do
    if (exists) found = load_relaxed(&given_of_row(call)[lane].may_solve);
  while (!__all_sync(~0u, !exists || has_come(shared, lane, found)));
  return choose(shared, exists && found / 2);
}

// By the block that solves, when all that block `block` of the row gave has been taken: what it did not use itself keeps its bit.
__device__ __forceinline__ void end_use(const Shared& shared, const lla::Call& call, int block) {
  const unsigned bit = shared.bits[block] ^ (block == block_of_row(call));
  store_relaxed(&given_of_row(call)[block].last, 2ull * shared.bits_of_choice[block] + bit);
  if (block == 0 && block_index() < call.splits) store_relaxed(&places(call).launches, shared.launch);
}
