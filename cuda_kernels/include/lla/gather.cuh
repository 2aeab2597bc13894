#pragma once
// Two or four blocks that share a row with heads of 64, of which one is given the moments of the others and solves the row by itself: its
// steps wait for no other block, where an exchange through the second-level cache takes longer than all else of a step.
//
// A block completes the moments of its keys and values about their means, and leaves them in the second-level cache. A bit of each 8 bytes
// says whether they are there: 0 and 1 in turn, from one use of their place to the next. So no fence and no counter is waited for, and
// nothing is cleared. The block that solves adds up the keys' moments of its own pair of blocks by its matrix warps and of the other pair,
// if there is one, by its transform warps, and then both. After that the transform warps add up the values', which they have in registers
// when a slope is there: they find its output while the matrix warps see whether it is the row's.
//
// Two parts about their own means become one with the distance of their means times its transpose, by both their shares. The sums are the
// same bits whichever block solves: pairs are made of the same blocks, and what makes two parts one does not know which is which.

#include "delay.cuh"
#include "lla/conjugate.cuh"
#include "lla/copies.cuh"
#include "lla/gather_choice.cuh"
#include "lla/passes.cuh"
#include "lla/weigh.cuh"
#include "ptx/dependents.cuh"
#include "ptx/opaque.cuh"

static_assert((GATHERED == 2 || GATHERED == 4) && MATRIX_THREADS == TRANSFORM_THREADS && MATRIX_THREADS == 2 * D, "a thread of a role for every column");
enum : int { KEYS, VALUES };  // kinds of moments

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

  // By whole warps.
  __device__ __forceinline__ void take(const Given& given, int kind, unsigned bit, int thread) {
    delay();
#pragma unroll 1
    while (true) {
      bool there = true;
#pragma unroll
      for (int j = 0; j < PART_WORDS; j++) there &= has_bit(words[j], bit);
      if (__all_sync(~0u, there)) break;
      ask(given, kind, thread);
    }
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

// How two parts become one, by their shares of both's weight.
struct Join {
  float first, second, distance;

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

  // The keys' moments of both. other(j): the second's.
  template <class Other>
  __device__ __forceinline__ void operator()(float (&sum)[D / 2], const float (&apart)[2 * D], int thread, Other other) const {
    const int upper = upper_row(thread), column = thread % 4 * 2;
    const float of_rows[2] = {apart[upper], apart[upper + 8]};
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) {
      const float4 y = other(j);
      const float2 of_columns = *reinterpret_cast<const float2*>(&apart[8 * j + column]);
      const float weighted[2] = {distance * of_columns.x, distance * of_columns.y};
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

// Each block's share of the row's weight, and how far its mean is from the row's: a sum of differences, as in share_sums. By the transform
// warps, a thread for every column, when all blocks' means are there.
__device__ __forceinline__ void weigh_parts(Shared& shared, const Given* given, int own, int column) {
  const int blocks = shared.blocks;
  Word16 words[GATHERED];
#pragma unroll
  for (int b = 0; b < GATHERED; b++) words[b] = b < blocks && b != own ? load_relaxed(&given[b].known[column]) : Word16{0, 0};
  Known of[GATHERED];
  float m = minus_infinity();
#pragma unroll
  for (int b = 0; b < GATHERED; b++) {
    if (b < blocks) of[b] = b == own ? Known(shared, column) : Known(words[b]);
    m = fmaxf(m, of[b].m);
  }
  float d1 = 0.0f;
#pragma unroll
  for (int b = 0; b < GATHERED; b++) of[b].d1 *= rescaling(of[b].m, m), d1 += of[b].d1;
  const float inverse_d1 = inverse_weight(d1);
#pragma unroll
  for (int b = 0; b < GATHERED; b++) of[b].d1 *= inverse_d1;
#pragma unroll
  for (int b = 0; b < GATHERED; b++) {
    float apart = 0.0f;
#pragma unroll
    for (int other = 0; other < GATHERED; other++) apart += of[other].d1 * (of[b].mean - of[other].mean);
    shared.apart_from_row[b][column] = apart;
    if (column == 0) shared.shares[b] = of[b].d1;
  }
}

// What a block's moments of values, numbers(j) about its own means, are of those of the row: their sum grows by it.
template <class Numbers>
__device__ __forceinline__ void add_values(const Shared& shared, int block, float (&sum)[D / 2], int thread, Numbers numbers) {
  const int upper = upper_row(thread), column = D + thread % 4 * 2;
  const auto& apart = shared.apart_from_row[block];
  const float share = shared.shares[block], distances[2] = {share * apart[upper], share * apart[upper + 8]};
#pragma unroll
  for (int j = 0; j < PART_WORDS; j++) {
    const float4 x = numbers(j);
    const float2 of_columns = *reinterpret_cast<const float2*>(&apart[8 * j + column]);
    sum[4 * j] += share * x.x + distances[0] * of_columns.x, sum[4 * j + 1] += share * x.y + distances[0] * of_columns.y;
    sum[4 * j + 2] += share * x.z + distances[1] * of_columns.x, sum[4 * j + 3] += share * x.w + distances[1] * of_columns.y;
  }
}

// The row's mean and moments of keys are known when both roles have added up their blocks: its solution, by the matrix warps. Whether it is
// left to the factorisation.
__device__ __forceinline__ bool solve_gathered(Shared& shared, const lla::Call& call, float ridge, Known known, float (&sum)[D / 2]) {
  const int thread = thread_index();
  float(&apart)[2 * D] = shared.apart[2];
  delay();
  mbarrier_wait(shared_address(&shared.weighed), 0);
  const Join join(known, {shared.d1_of_others, shared.m_of_others, shared.mean_of_others[thread]}, apart[thread]);
  shared.total.mean[thread] = known.mean;
  if (thread < D) entry_of_row(shared.solving.right, thread) = query_at(shared, thread) - known.mean;
  come(shared.paired);
  meet_matrix_warps();
  mbarrier_wait(shared_address(&shared.given), 0);
  join(sum, apart, thread, [&](int j) { return shared.of_others[j][thread]; });
  float c[D];
#pragma unroll
  for (int e = 0; e < D / 2; e++) c[e] = 0.0f, c[D / 2 + e] = sum[e];
  if (solve_by_steps(shared, call, ridge, Exchange(shared, call), c)) return false;
  leave_to_factorisation(shared, c, true, ridge);
  meet(shared.met, parity_of_decision(shared, shared.proposals));
  return true;
}

// By the transform warps, who have added up their blocks' keys: the same of all values, and then the output of each slope that the matrix
// warps propose.
__device__ __forceinline__ bool multiply_gathered(Shared& shared, const lla::Call& call, float (&sum)[D / 2]) {
  Given* const given = given_of_row(call);
  const int thread = thread_index() - MATRIX_THREADS, own = block_of_row(call), blocks = shared.blocks;
  leave(shared.of_others, thread, sum);
  come(shared.given);
  // To shared memory, where registers would not do for all at once.
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    if (block == own) continue;
#pragma unroll
    for (int j = 0; j < PART_WORDS; j++) copy_16(shared_address(&shared.values[block][j][thread]), &given[block].moments[VALUES][j][thread]);
  }
  copy_commit();
  // The matrix warps have left the block's own, and what the other of its pair knows has come too.
  mbarrier_wait(shared_address(&shared.paired), 0);
  weigh_parts(shared, given, own, thread);
  copy_wait<0>();
  barrier_sync(TRANSFORM, TRANSFORM_THREADS);
#pragma unroll
  for (int e = 0; e < D / 2; e++) sum[e] = 0.0f;
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    Part part;
    part.find(shared.values[block], thread);
    if (block != block_of_row(call)) part.take(given_of_row(call)[block], VALUES, shared.bits[block], thread);
    add_values(shared, block, sum, thread, [&](int j) { return part.of(j); });
  }
  // For the factorisation, if it comes to that.
  leave(shared.values[0], thread, sum);
  // All that the row's blocks gave has been taken, or is there and will be.
  if (thread < blocks) end_use(shared, call, thread);
  unsigned parity = 0;
#pragma unroll 1
  do {
    delay();
    mbarrier_wait(shared_address(&shared.proposed), parity);
    float o = 0.0f;
    if (shared.is_proposed) {
      multiply_values(shared, sum, thread, shared.slope[upper_row(thread)], shared.slope[upper_row(thread) + 8]);
      barrier_sync(TRANSFORM, TRANSFORM_THREADS);
      if (thread < D) o = shared.total.mean[D + thread] + sum_of_outputs(shared, thread);
    }
    meet(shared.met, parity_of_decision(shared, parity));
    parity ^= 1;
    if (shared.solved_by_steps == SOLVED) {
      if (thread < D) output_of(call, row_of_block(call))[thread] = narrow<BFLOAT>(o);
      return false;
    }
  } while (shared.solved_by_steps == GOES_ON);
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
  float(&apart)[2 * D] = shared.apart[is_matrix ? 0 : 1];
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
    join(sum, apart, thread, [&](int j) { return next.of(j); });
  }
  return is_matrix ? solve_gathered(shared, call, ridge, known, sum) : multiply_gathered(shared, call, sum);
}
