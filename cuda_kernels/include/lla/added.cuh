#pragma once
// A step's product, whose rows all blocks that share a row of attention add up in the second-level cache: a word for each, that a block
// adds its part to, and looks at in place of as many words as there are blocks.
//
// So that a sum does not depend on who comes first, parts are whole numbers of a unit. The word also counts the blocks that have added
// theirs, and those that could not: the sum is NaN then, and the row is left to the factorisation.
//
// Steps have two places in turn, as mail has: who adds to one has what all added to the other, before which they had all that was in
// this one. A place is not cleared while a row is solved; what it had before is subtracted. Launches have two pairs of places in turn,
// and each clears the other's.

#include "lla/mail.cuh"
#include "lla/vectors.cuh"

static_assert(!ADDED_UP || SHARERS <= 16, "the fields of a word");

// What parts are whole numbers of: a power of two, of 2^-27 to 2^-25 times the ridge and the vector's largest entry. The ridge times the
// vector is what the product is added to, in float32.
struct Unit {
  unsigned exponent;  // as a float has it

  Unit() = default;
  __device__ __forceinline__ Unit(const Entries& vector, float ridge) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) largest = fmaxf(largest, fabsf(vector.of[e]));
    const int of_both = (__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23) + (__float_as_uint(ridge) >> 23);
    exponent = min(max(of_both - 127 - 25, 1), 253);
  }
  __device__ __forceinline__ float size() const { return __uint_as_float(exponent << 23); }
  __device__ __forceinline__ float inverse() const { return __uint_as_float((254 - exponent) << 23); }
};

// The pair of places of this launch, or of the next.
__device__ __forceinline__ auto& places_of(const Exchange& exchange, bool next) {
  return exchange.mail->added[(exchange.tag / MOST_EXCHANGES + next) % 2];
}

// The thread's row of a step's product, as row_of_product.
template <class Block>
struct AddedRow {
  // In a word: the blocks that could not add anything, those that have been there, and the sum, to which each adds OFFSET, so that
  // nothing is borrowed.
  static constexpr unsigned long long FAILED = 1ull << 59, CAME = 1ull << 54, OFFSET = 1ull << 49;
  const Exchange& exchange;
  unsigned long long& before;
  unsigned long long* word;

  __device__ __forceinline__ AddedRow(Block& shared, const Exchange& exchange, int thread, int number)
      : exchange(exchange), before(shared.solving.added[number % 2][row_of_product(thread)]),
        word(&places_of(exchange, false)[number % 2][row_of_product(thread)]) {}

  __device__ __forceinline__ void add(int thread, float y, const Unit& unit) const {
    if (thread % 4 >= 2) return;
    const float units = y * unit.inverse();
    add_relaxed(word, CAME + (fabsf(units) < float(OFFSET) ? OFFSET + __float2ll_rn(units) : FAILED));
  }

  // By whole warps.
  __device__ __forceinline__ float receive(int thread, const Unit& unit) const {
    unsigned long long found;
    do found = load_relaxed(word) - before;
    while (__any_sync(~0u, found / CAME % (FAILED / CAME) != exchange.blocks));
    __syncwarp();
    if (thread % 4 < 2) before += found;
    const long long units = found % CAME - exchange.blocks * OFFSET;
    return found < FAILED ? unit.size() * units : quiet_nan();
  }
};
