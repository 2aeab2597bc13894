#pragma once
// Two or four blocks that share a row with heads of 64, of which one is given the moments of the others and solves the row by itself: its
// steps wait for no other block, where an exchange through the second-level cache takes longer than all else of a step.
//
// A block completes the moments of its keys and values about their means, and leaves them in the second-level cache. A bit of each 8 bytes
// says whether they are there: 0 and 1 in turn, from one use of their place to the next. So no fence and no counter is waited for, and
// nothing is cleared. The block that solves adds up the keys' moments of its own pair of blocks by its matrix warps and of the other pair,
// if there is one, by its transform warps, and then both. After that the transform warps add up the values', which they have in registers
// when a slope is there: they find its output while the matrix warps see whether it is the row's. Until then both roles take each other's
// time, so that the values' have few instructions.
//
// Two parts about their own means become one with the distance of their means times its transpose, by both their shares. The sums are the
// same bits whichever block solves: pairs are made of the same blocks, and what makes two parts one does not know which is which.

#include "delay.cuh"
#include "lla/conjugate_alone.cuh"
#include "lla/copies.cuh"
#include "lla/gather_choice.cuh"
#include "lla/passes.cuh"
#include "lla/weigh.cuh"
#include "ptx/dependents.cuh"
#include "ptx/opaque.cuh"

static_assert((GATHERED == 2 || GATHERED == 4) && MATRIX_THREADS == TRANSFORM_THREADS && MATRIX_THREADS == 2 * D, "a thread of a role for every column");
enum : int { KEYS, VALUES };                // kinds of moments
enum : int { OF_OTHERS, OF_OWN, OF_BOTH };  // pairs: that of other blocks, the block's own, and of both pairs

// Four numbers, the first and the third with the bit in the place of their own last: whoever sees a half of the word sees the bit.
__device__ __forceinline__ Word16 word_of(unsigned bit, float x, float y, float z, float w) {
  return {__float_as_uint(x) & ~1u | bit | static_cast<unsigned long long>(__float_as_uint(y)) << 32,
          __float_as_uint(z) & ~1u | bit | static_cast<unsigned long long>(__float_as_uint(w)) << 32};
}

__device__ __forceinline__ bool has_bit(const Word16& word, unsigned bit) { return ((unsigned(word.first) ^ bit | unsigned(word.second) ^ bit) & 1) == 0; }

// The numbers, without the bit: or results would differ from one use to the next.
__device__ __forceinline__ float4 numbers_of(const Word16& word) {
  return {__uint_as_float(unsigned(word.first) & ~1u), __uint_as_float(unsigned(word.first >> 32)), __uint_as_float(unsigned(word.second) & ~1u),
          __uint_as_float(unsigned(word.second >> 32))};
}

// Accumulators of the matrix threads in shared memory, each thread's own.
using LyingPart = float4[PART_WORDS][MATRIX_THREADS];

// A thread's accumulators of a block's moments; on their way until they are taken.
struct Part {
  Word16 words[PART_WORDS];

  __device__ __forceinline__ void ask(const Given& given, int kind, int thread) {
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) words[j] = load_relaxed(&given.moments[kind][j][thread]);
  }

  // Whether one of them is not there yet, in the last bit.
  __device__ __forceinline__ unsigned missing(unsigned bit) const {
    unsigned any = 0, every = 1;
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) any |= unsigned(words[j].first) | unsigned(words[j].second), every &= unsigned(words[j].first) & unsigned(words[j].second);
    return bit ? ~every : any;
  }

  // By whole warps.
  __device__ __forceinline__ void take(const Given& given, int kind, unsigned bit, int thread) {
    delay();
#pragma unroll 1
    while (__any_sync(~0u, missing(bit) & 1)) ask(given, kind, thread);
  }

  // As they lie in shared memory.
  __device__ __forceinline__ void find(const LyingPart& at, int thread) {
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) words[j] = *reinterpret_cast<const Word16*>(&at[j][thread]);
  }

  // The block's own, as others have them.
  __device__ __forceinline__ void put(const float* accumulators) {
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) {
      const float* x = accumulators + 4 * j;
      words[j] = word_of(0, copy_opaque(x[0]), copy_opaque(x[1]), copy_opaque(x[2]), copy_opaque(x[3]));
    }
  }

  __device__ __forceinline__ void give(Given& given, int kind, unsigned bit, int thread) const {
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) store_relaxed(&given.moments[kind][j][thread], Word16{words[j].first | bit, words[j].second | bit});
  }

  __device__ __forceinline__ float4 of(int j) const { return numbers_of(words[j]); }
};

// Accumulators to where the thread has them in shared memory.
__device__ __forceinline__ void leave(LyingPart& at, int thread, const float* numbers) {
#pragma unroll
  for (int j = 0; j < PART_WORDS; j++) at[j][thread] = {numbers[4 * j], numbers[4 * j + 1], numbers[4 * j + 2], numbers[4 * j + 3]};
}

// What is known of the keys of some blocks beside their moments: their weight relative to a maximum, and the mean of a thread's column.
struct Known {
  float d1 = 0.0f, m = minus_infinity(), mean = 0.0f;

  Known() = default;
  __device__ __forceinline__ Known(float d1, float m, float mean) : d1(d1), m(m), mean(mean) {}
  __device__ __forceinline__ explicit Known(const Word16& word) {
    const float4 numbers = numbers_of(word);
    d1 = numbers.x, m = numbers.y, mean = numbers.z;
  }
  // Of the block's own keys.
  __device__ __forceinline__ Known(const Shared& shared, int column) : Known(word_of(0, shared.own.d1, shared.own.m, mean_of(shared, column), 0.0f)) {}

  __device__ __forceinline__ void give(Given& given, unsigned bit, int column) const { store_relaxed(&given.known[column], word_of(bit, d1, m, mean, 0.0f)); }
};

// What two blocks know, as it comes; of those that are asked. By whole warps.
__device__ __forceinline__ void take_known(const Shared& shared, const Given* given, int first, int second, bool ask_first, bool ask_second, int column,
                                           Known& of_first, Known& of_second) {
  Word16 words[2];
  bool there;
  delay();
  do {
    if (ask_first) words[0] = load_relaxed(&given[first].known[column]);
    if (ask_second) words[1] = load_relaxed(&given[second].known[column]);
    there = true;
    if (ask_first) there &= has_bit(words[0], shared.bits[first]);
    if (ask_second) there &= has_bit(words[1], shared.bits[second]);
  } while (!__all_sync(~0u, there));
  if (ask_first) of_first = Known(words[0]);
  if (ask_second) of_second = Known(words[1]);
}

struct Join : Shares {
  __device__ __forceinline__ explicit Join(const Shares& shares) : Shares(shares) {}
  // Both become one in `known`. Leaves the distance of the means in a column of `apart`, for all to see after a barrier.
  __device__ __forceinline__ Join(Known& known, const Known& other, float& apart) {
    const float m = fmaxf(known.m, other.m), of_first = known.d1 * rescaling(known.m, m), of_second = other.d1 * rescaling(other.m, m);
    const float d1 = __fadd_rn(of_first, of_second), inverse = d1 == 0.0f ? 0.0f : reciprocal_fast(d1);
    first = of_first * inverse, second = of_second * inverse, distance = first * second;
    apart = other.mean - known.mean;
    known = {d1, m, __fadd_rn(__fmul_rn(first, known.mean), __fmul_rn(second, other.mean))};
  }

  __device__ __forceinline__ float operator()(float x, float y, float of_row, float of_column) const {
    return __fmaf_rn(of_row, of_column, __fadd_rn(__fmul_rn(first, x), __fmul_rn(second, y)));
  }

  // The moments of both, of keys or of values. apart: of the rows, and from its column of_columns on of the columns. other(j): the second's.
  template <class Other>
  __device__ __forceinline__ void operator()(float (&sum)[D / 2], const float* apart, int of_columns, int thread, Other other) const {
    const int upper = upper_row(thread), column = of_columns + thread % 4 * 2;
    const float of_rows[2] = {apart[upper], apart[upper + 8]};
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) {
      const float4 y = other(j);
      const float2 of_pair = *reinterpret_cast<const float2*>(&apart[8 * j + column]);
      const float weighted[2] = {distance * of_pair.x, distance * of_pair.y};
      sum[4 * j] = (*this)(sum[4 * j], y.x, of_rows[0], weighted[0]), sum[4 * j + 1] = (*this)(sum[4 * j + 1], y.y, of_rows[0], weighted[1]);
      sum[4 * j + 2] = (*this)(sum[4 * j + 2], y.z, of_rows[1], weighted[0]), sum[4 * j + 3] = (*this)(sum[4 * j + 3], y.w, of_rows[1], weighted[1]);
    }
  }
};

// The values' moments about the means of the block's keys and values, divided by their weight, in place.
__device__ __forceinline__ void centre_values(const Shared& shared, float (&c)[D], int thread) {
  const Centring centre(shared);
  const int upper = upper_row(thread), column = thread % 4 * 2;
  const float factor = centre.inverse_d1 * centre.factor, weight = centre.inverse_d1 * centre.inverse_d1;
  const float means[2] = {weight * shared.sums[upper], weight * shared.sums[upper + 8]};
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    const float2 sums = *reinterpret_cast<const float2*>(&shared.sums[D + 8 * j + column]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* pair = c + 4 * j + 2 * h;
      pair[0] = factor * pair[0] - means[h] * sums.x, pair[1] = factor * pair[1] - means[h] * sums.y;
    }
  }
}

// What is known of a row: a slope that was proposed is not near enough; or it is the row's, or there is none.
enum : unsigned { GOES_ON, SOLVED, UNSOLVED };

// before: slopes that came before the one that is decided on.
__device__ __forceinline__ unsigned parity_of_decision(const Shared& shared, unsigned before) { return shared.exact ^ 1 ^ before & 1; }

// What came of a slope, which both roles know then.
__device__ __forceinline__ void decide(Shared& shared, unsigned what, unsigned before) {
  if (thread_index() == 0) shared.decided[before % 2] = what;
  meet(shared.met, parity_of_decision(shared, before));
}

// By the matrix warps, whose moments of the row's keys are c: the transform warps are given each slope that steps lead to, to find its output.
// Whether the row is solved. proposals: slopes that were given, or the word that there is none.
__device__ __forceinline__ bool solve_with_others(Shared& shared, float ridge, const float (&c)[D / 2], unsigned& proposals) {
  const int thread = thread_index();
  IterateAlone at(right_side(shared, thread % 32), ridge);
#pragma unroll 1
  for (unsigned number = 1;; number++) {  // of the product
    const bool is_near = take_steps_alone(shared, c, ridge, thread, at, number);
    if (thread == 0) shared.is_proposed = is_near;
    come(shared.proposed);
    if (!is_near) {
      decide(shared, UNSOLVED, proposals++);
      return false;
    }
    const TrueResidual residual(shared, c, ridge, thread, at, number);
    const bool is_solved = residual.is_near(at, ridge);
    decide(shared, is_solved ? SOLVED : GOES_ON, proposals++);
    if (is_solved) return true;
    residual.begin_anew(at, ridge);
  }
}

// The row's mean and moments of keys are known when both roles have added up their blocks: its solution, by the matrix warps. Whether it is
// left to the factorisation.
__device__ __forceinline__ bool solve_gathered(Shared& shared, float ridge, Known known, float (&sum)[D / 2]) {
  const int thread = thread_index();
  float(&apart)[2 * D] = shared.apart[OF_BOTH];
  delay();
  mbarrier_wait(shared_address(&shared.weighed), 0);
  const Join join(known, {shared.d1_of_others, shared.m_of_others, shared.mean_of_others[thread]}, apart[thread]);
  shared.total.mean[thread] = known.mean;
  if (thread < D) entry_of_row(shared.solving.right, thread) = query_at(shared, thread) - known.mean;
  if (thread == 0) shared.joins[OF_BOTH] = join;
  come(shared.paired);
  meet_matrix_warps();
  mbarrier_wait(shared_address(&shared.given), 0);
  join(sum, apart, 0, thread, [&](int j) { return shared.of_others[j][thread]; });
  unsigned proposals = 0;
  if (solve_with_others(shared, ridge, sum, proposals)) return false;
  // The transform warps have left the values' as they are.
  float c[D];
#pragma unroll
  for (int j = 0; j < PART_WORDS; j++) {
    const float4 values = shared.values[0][j][thread];
    c[4 * j] = values.x, c[4 * j + 1] = values.y, c[4 * j + 2] = values.z, c[4 * j + 3] = values.w;
#pragma unroll
    for (int e = 4 * j; e < 4 * j + 4; e++) c[D / 2 + e] = sum[e];
  }
  leave_moments(shared, c, 1.0f, ridge, 1.0f, {0.0f, 0.0f});
  meet(shared.met, parity_of_decision(shared, proposals));
  return true;
}

// A block's moments of values, to where the thread has them in shared memory: registers would not do for all at once.
__device__ __forceinline__ void copy_values(Shared& shared, const Given* given, int block, int thread) {
#pragma unroll
  for (int j = 0; j < PART_WORDS; j++) copy_16(shared_address(&shared.values[block][j][thread]), &given[block].moments[VALUES][j][thread]);
}

// Each block's share of the row's weight, and how far its mean is from the row's, by how pairs are joined; by the transform warps, a thread for
// every column. To the same bits whichever block solves.
__device__ __forceinline__ void leave_parts(Shared& shared, int own, int column) {
  const Shares of_both = shared.joins[OF_BOTH];
  const float apart_of_both = shared.apart[OF_BOTH][column];
#pragma unroll
  for (int pair = 0; pair < GATHERED / 2; pair++) {
    const bool is_own = pair == own / 2;
    const int first = is_own ? own : 2 * pair;
    const Shares shares = shared.joins[is_own ? OF_OWN : OF_OTHERS];
    const float apart = shared.apart[is_own ? OF_OWN : OF_OTHERS][column];
    const float share = is_own ? of_both.first : of_both.second;
    const float of_pair = is_own ? -__fmul_rn(of_both.second, apart_of_both) : __fmul_rn(of_both.first, apart_of_both);
    shared.apart_from_row[first][column] = __fadd_rn(of_pair, -__fmul_rn(shares.second, apart));
    shared.apart_from_row[first ^ 1][column] = __fadd_rn(of_pair, __fmul_rn(shares.first, apart));
    if (column == 0) shared.shares[first] = __fmul_rn(share, shares.first), shared.shares[first ^ 1] = __fmul_rn(share, shares.second);
  }
}

// The values' moments of all blocks, each about its own means, become those of the row. Those of others were asked for.
__device__ __forceinline__ void add_values(Shared& shared, const Given* given, int own, int thread, float (&sum)[D / 2]) {
  const int upper = upper_row(thread), column = D + thread % 4 * 2, blocks = shared.blocks;
#pragma unroll
  for (int e = 0; e < D / 2; e++) sum[e] = 0.0f;
  copy_wait<0>();
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    const float* apart = shared.apart_from_row[block];
    const float share = shared.shares[block], distances[2] = {share * apart[upper], share * apart[upper + 8]};
    const unsigned bit = shared.bits[block], last = block == own ? 0 : 1;
    Part part;
    part.find(shared.values[block], thread);
    while (__any_sync(~0u, part.missing(bit) & last)) part.ask(given[block], VALUES, thread);
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) {
      const float4 x = part.of(j);
      const float2 of_columns = *reinterpret_cast<const float2*>(&apart[8 * j + column]);
      sum[4 * j] = __fmaf_rn(distances[0], of_columns.x, __fmaf_rn(share, x.x, sum[4 * j]));
      sum[4 * j + 1] = __fmaf_rn(distances[0], of_columns.y, __fmaf_rn(share, x.y, sum[4 * j + 1]));
      sum[4 * j + 2] = __fmaf_rn(distances[1], of_columns.x, __fmaf_rn(share, x.z, sum[4 * j + 2]));
      sum[4 * j + 3] = __fmaf_rn(distances[1], of_columns.y, __fmaf_rn(share, x.w, sum[4 * j + 3]));
    }
  }
}

// By the transform warps, who have added up their blocks' keys: the same of all values, and then the output of each slope that the matrix
// warps propose.
__device__ __forceinline__ bool multiply_gathered(Shared& shared, const lla::Call& call, float (&sum)[D / 2]) {
  const Given* const given = given_of_row(call);
  const int thread = thread_index() - MATRIX_THREADS, own = block_of_row(call), blocks = shared.blocks;
  leave(shared.of_others, thread, sum);
  come(shared.given);
#pragma unroll 1
  for (int block = 0; block < blocks; block++)
    if (block != own) copy_values(shared, given, block, thread);
  copy_commit();
  // The matrix warps have left the block's own, and how pairs are joined.
  delay();
  mbarrier_wait(shared_address(&shared.paired), 0);
  leave_parts(shared, own, thread);
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
  add_values(shared, given, own, thread, sum);
  // All that the row's blocks gave has been taken, or is there and will be.
  if (thread < blocks) end_use(shared, call, thread);
  half_bits* output = output_of(call, row_of_block(call));
  make_opaque(output);
  unsigned parity = 0, decided;
#pragma unroll 1
  do {
    delay();
    mbarrier_wait(shared_address(&shared.proposed), parity);
    if (shared.is_proposed) {
      const int upper = upper_row(thread);
      multiply_values(shared, sum, thread, entry_of_row(shared.solving.vectors[0], upper), entry_of_row(shared.solving.vectors[0], upper + 8));
      barrier_sync(TRANSFORM, TRANSFORM_THREADS);
      // On its way while the matrix warps decide: what comes after a slope that is not near enough takes its place.
      if (thread < D) output[thread] = narrow<BFLOAT>(shared.total.mean[D + thread] + sum_of_outputs(shared, thread));
    } else {
      // To be factored.
      leave(shared.values[0], thread, sum);
    }
    meet(shared.met, parity_of_decision(shared, parity));
    decided = shared.decided[parity];
    parity ^= 1;
    if (decided == SOLVED) return false;
  } while (decided == GOES_ON);
  meet(shared.met, parity_of_decision(shared, parity));
  return true;
}

// By all warps of a block that shares a row; whether the row is left to the factorisation, by this block.
__device__ __forceinline__ bool gather_and_solve(Shared& shared, const lla::Call& call, const Maps& maps, int tiles, bool is_matrix) {
  Given* const given = given_of_row(call);
  const int own = block_of_row(call);
  Part part;
  Known known;
  if (is_matrix) {
    float accumulators[D];
    accumulate_all<64>(shared, call, maps, accumulators, tiles);
    const int thread = thread_index();
    const bool gives = own != solving_block(shared, call);
    complete_moments<false>(shared, accumulators, thread);
    part.put(accumulators + D / 2);
    if (gives) part.give(given[own], KEYS, shared.bits[own], thread);
    centre_values(shared, accumulators, thread);
    if (gives) {
      part.put(accumulators), part.give(given[own], VALUES, shared.bits[own], thread);
      return false;
    }
    leave(shared.values[own], thread, accumulators);
    known = Known(shared, thread);
  } else {
    while (weigh(shared, call, maps, tiles, 0, 0), again(shared, TRANSFORM, TRANSFORM_THREADS))
      bring_first(shared, call, maps, Source(shared), tiles);
    let_next_launch_begin();
    const int column = thread_index() - MATRIX_THREADS;
    if (own != solving_block(shared, call)) {
      Known(shared, column).give(given[own], shared.bits[own], column);
      return false;
    }
  }
  // From here on both roles run the same code, each for two blocks: what is fetched for one is there for the other.
  const int thread = thread_index() % MATRIX_THREADS, blocks = shared.blocks;
  const float ridge = row_of_block(call).ridge(call);
  // The block's own and the other of its pair; or the other pair.
  const int first = is_matrix ? own : (own & 2) ^ 2, second = first ^ 1;
  const bool ask_first = !is_matrix && first < blocks, ask_second = second < blocks;
  float(&apart)[2 * D] = shared.apart[is_matrix ? OF_OWN : OF_OTHERS];
  Known of_second;
  take_known(shared, given, first, second, ask_first, ask_second, thread, known, of_second);
  Part next;
  if (ask_first) part.ask(given[first], KEYS, thread);
  if (ask_second) next.ask(given[second], KEYS, thread);
  const Join join(known, of_second, apart[thread]);
  if (!is_matrix) {
    shared.mean_of_others[thread] = known.mean;
    if (thread == 0) shared.d1_of_others = known.d1, shared.m_of_others = known.m;
    come(shared.weighed);
  }
  if (thread == 0) shared.joins[is_matrix ? OF_OWN : OF_OTHERS] = join;
  barrier_sync(is_matrix ? MATRIX : TRANSFORM, MATRIX_THREADS);
  if (ask_first) part.take(given[first], KEYS, shared.bits[first], thread);
  float sum[D / 2];
#pragma unroll
  for (int j = 0; j < PART_WORDS; j++) {
    const float4 x = is_matrix || ask_first ? part.of(j) : float4{};
    sum[4 * j] = x.x, sum[4 * j + 1] = x.y, sum[4 * j + 2] = x.z, sum[4 * j + 3] = x.w;
  }
  if (ask_second) {
    next.take(given[second], KEYS, shared.bits[second], thread);
    join(sum, apart, 0, thread, [&](int j) { return next.of(j); });
  }
  return is_matrix ? solve_gathered(shared, ridge, known, sum) : multiply_gathered(shared, call, sum);
}
