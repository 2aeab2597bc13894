#pragma once
// The steps of conjugate gradients by all blocks that share a row, each with the moments of its own keys.
//
// Every warp has all of each vector, ENTRIES of a lane, and does the same with it to the same bits. So there is one exchange a step, that of
// the product's rows.

#include "lla/added.cuh"
#include "lla/iterate.cuh"
#include "lla/mail.cuh"
#include "lla/steps.cuh"

static_assert(MOST_STEPS + 2 < MOST_EXCHANGES, "each has an exchange, after that of the sums; and the slope has one");
static_assert(ROW_BLOCKS == 1);

// Of the blocks: those that a lane or a thread adds up, another has the rest.
constexpr int HALF = SHARERS / 2;
constexpr int AT_ONCE = HALF > 4 && D == 64 ? 4 : HALF;  // for want of registers

// A lane's row of a product, of the moments of all blocks, to word `first` of an exchange and on.
__device__ __forceinline__ void send_row(const Exchange& exchange, int thread, int number, int first, float y) {
  if (thread % 4 < 2) exchange.send(number, first + row_of_product(thread), y);
}

// And of all blocks, of a step. The lanes that share the row each add up half of the blocks.
__device__ __forceinline__ float receive_row(const Exchange& exchange, int thread, int number) {
  float y = 0.0f;
#pragma unroll
  for (int from = 0; from < HALF; from += AT_ONCE) {
    float x[AT_ONCE];
    exchange.receive(number, thread % 4 / 2 * HALF + from, row_of_product(thread), x);
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) y += x[b];
  }
  return y + __shfl_xor_sync(~0u, y, 2);
}

// The lane's entries of a product whose rows all warps have. Waits for all warps.
__device__ __forceinline__ Entries gather_rows(Shared& shared, int thread, int number, float row) {
  const ProductPlace place(shared, thread, number);
  place.leave({{row}});
  meet_matrix_warps();
  return place.find();
}

// A row of a product for all blocks, of step `number`.
template <class Block>
__device__ __forceinline__ void send_step(Block& shared, const Exchange& exchange, int thread, int number, float y, const Unit& unit) {
  if constexpr (ADDED_UP)
    AddedRow(shared, exchange, thread, number).add(thread, y, unit);
  else
    send_row(exchange, thread, number, 0, y);
}

// The lane's entries of a step's product, of which all blocks send their rows.
template <class Block>
__device__ __forceinline__ Entries receive_step(Block& shared, const Exchange& exchange, int thread, int number, const Unit& unit) {
  if constexpr (ADDED_UP)
    return gather_rows(shared, thread, number, AddedRow(shared, exchange, thread, number).receive(thread, unit));
  else
    return gather_rows(shared, thread, number, receive_row(exchange, thread, number));
}

struct IterateTogether : Iterate {
  using Iterate::Iterate;

  // With the slope's true residual, where that is not small: a step's length was foreseen and wrong, or the residual of the recurrences has
  // drifted from it, as with keys along a few directions. For the latter there are not the registers: NaN ends the steps.
  __device__ __forceinline__ void begin_anew(const Entries& residual, float ridge) {
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) r.of[e] = progress.is_foreseen() ? residual.of[e] : quiet_nan();
    p = s = {}, progress.begin_anew(ridge);
  }
};

// Until the slope is thought to be near enough, whether it was after MOST_STEPS. Then it is beyond what has that residual by a step that was
// foreseen, if one was. complete(y, x): what the blocks make of the lane's row of a product with x. number: of the first exchange, then of
// the next. sent: whether that one's product was sent, which none receives.
template <class Complete>
__device__ __forceinline__ bool take_steps_together(Shared& shared, const Exchange& exchange, const float* moments, const Complete& complete, float ridge,
                                                    int thread, IterateTogether& at, int& number, bool& sent) {
  const int lane = thread % 32;
  LyingVector& vector = shared.solving.vectors[thread / 32];
  Entries &x = at.x, &r = at.r, &p = at.p;
  Progress& progress = at.progress;
  bool small = false, likely = false;  // likely: that this residual is small
  Unit unit;
#pragma unroll 1
  while (true) {
    const auto multiply = [&] {
      entries_of_lane(vector, lane) = r;
      if constexpr (ADDED_UP) unit = Unit(r, ridge);
      __syncwarp();
      const float row = multiply_rows_of_warp<false>(vector, moments, thread).of[0];
      send_step(shared, exchange, thread, number, complete(row, r), unit);
    };
    const auto look = [&] {
      progress.look(inner_product(r, r), ridge);
      // The same in all lanes, as the compiler sees by this.
      small = __any_sync(~0u, progress.is_small(progress.left() * progress.gamma, TOLERANCE));
    };
    // While the product is on its way or, where it is likely to be in vain, before. Each in one place: what is run for the first time
    // is slow.
#pragma unroll 1
    for (int part = 0; part < 2 && !small; part++) {
      if (part == likely)
        multiply();
      else
        look();
    }
    if (small || __any_sync(~0u, !(progress.gamma < -minus_infinity())) || number > MOST_STEPS) break;
    // As the residual fell last.
    likely = __any_sync(~0u, progress.beta > 0.0f && progress.is_small(progress.beta * progress.left() * progress.gamma, TOLERANCE));
    const Entries rows = receive_step(shared, exchange, thread, number, unit);
    at.advance(rows, inner_product(r, rows), ridge);
    number++;
  }
  sent = !(likely && small);
  const float length = small ? progress.foreseen_length() : 0.0f;
#pragma unroll
  for (int e = 0; e < ENTRIES; e++) x.of[e] = __fmaf_rn(length, __fmaf_rn(progress.beta, p.of[e], r.of[e]), x.of[e]);
  return small;
}

// Whether the slope that steps led to is near enough, of which this is the residual; `last` is what take_steps_together left in r.
__device__ __forceinline__ bool is_near(const Iterate& at, const Entries& residual, const Entries& last, float ridge) {
  const float square = inner_product(residual, residual), with_last = inner_product(residual, last);
  return __any_sync(~0u, at.progress.is_near(square, with_last, ridge));
}
