#pragma once
// The steps of conjugate gradients by the matrix warps of one block, which has all of the row's moments.
//
// Every warp has all of each vector, ENTRIES of a lane, and does the same with it to the same bits. So there is one exchange a step, that of
// the product's rows and of what the warps have of its inner product with the vector.
//
// The product is there before it is known how large the residual is that it was for, so that a step is taken with it in any case. It is the
// last one if what it leaves is thought to be small, as the residual fell in the last two; whether it is, the true
// residual says, which is looked at anyway.

#include "lla/iterate.cuh"
#include "lla/steps.cuh"

struct IterateAlone : Iterate {
  bool is_foreseen = false;          // that the residual is small; it was not before the last step
  float square = -minus_infinity();  // of the slope's true residual, when steps that were not foreseen last began anew

  using Iterate::Iterate;
};

// Where the slope lies after steps, for the warp.
template <class Block>
__device__ __forceinline__ LyingVector& lying_slope(Block& shared, int thread) { return shared.solving.vectors[thread / 32]; }

// Until the residual is thought to be small enough; whether it is. The slope lies in lying_slope then. number: of the first product, then of
// the next.
template <class Block>
__device__ __forceinline__ bool take_steps_alone(Block& shared, const float* moments, float ridge, int thread, IterateAlone& at, unsigned& number) {
  const int lane = thread % 32;
  LyingVector& vector = shared.solving.vectors[thread / 32];
  Progress& progress = at.progress;
#pragma unroll 1
  while (true) {
    entries_of_lane(vector, lane) = at.r;
    __syncwarp();
    // Beside the product, whose sums come between these instructions.
    const float square = inner_product(at.r, at.r);
    const Rows product = multiply_rows_of_warp<true>(vector, moments, thread);
    float(&of_warps)[MATRIX_WARPS] = shared.solving.curvatures[number % 2];
    if (lane == 0) of_warps[thread / 32] = product.curvature;
    const ProductPlace place(shared, thread, number++);
    place.leave(product);
    meet_matrix_warps();
    const Entries rows = place.find();
    progress.look(square, ridge);
    const bool is_small = progress.is_small(square, TOLERANCE), will_be_small = is_small | progress.is_small(progress.next_square(), TOLERANCE);
    const bool is_last = will_be_small | !(square < -minus_infinity()) | number > MOST_STEPS + 1;
    float sums[4];
#pragma unroll
    for (int warp = 0; warp < MATRIX_WARPS; warp++) sums[warp % 4] = warp < 4 ? of_warps[warp] : sums[warp % 4] + of_warps[warp];
    at.advance(rows, (sums[0] + sums[1]) + (sums[2] + sums[3]), ridge);
    // The same in all lanes, as the compiler sees by this.
    if (__any_sync(~0u, is_last)) {
      entries_of_lane(vector, lane) = at.x;
      __syncwarp();
      at.is_foreseen = !__any_sync(~0u, is_small);
      return __any_sync(~0u, will_be_small);
    }
  }
}

// Puts what steps found into the system once: in float32 the residual of the recurrences may drift from the true one.
struct TrueResidual {
  Entries of;
  float square;

  template <class Block>
  __device__ __forceinline__ TrueResidual(Block& shared, const float* moments, float ridge, int thread, const IterateAlone& at, unsigned number) {
    const ProductPlace place(shared, thread, number);
    place.leave(multiply_rows_of_warp<false>(lying_slope(shared, thread), moments, thread));
    meet_matrix_warps();
    of = residual_of(right_side(shared, thread % 32), ridge, at.x, place.find());
    square = inner_product(of, of);
  }

  // Whether the slope is near enough. Where steps were taken anew, and the residual is not much smaller than before, rounding leaves it: where
  // one key outweighs many others. A factorisation in float32 leaves as much.
  __device__ __forceinline__ bool is_near(const IterateAlone& at, float ridge) const {
    const float tolerance = at.is_foreseen ? TOLERANCE : NEARLY_ROUNDED;
    return __any_sync(~0u, at.progress.is_near_after_step(square, ridge, tolerance) || (!at.is_foreseen && square > 0.25f * at.square));
  }

  // With that, where it is not small: the last step led less far than it was thought to, or the residual of the recurrences has drifted from
  // the true one, as with keys along a few directions.
  __device__ __forceinline__ void begin_anew(IterateAlone& at, float ridge) const {
    if (!at.is_foreseen) at.square = square;
    at.r = of, at.p = at.s = {}, at.progress.begin_anew(ridge);
  }
};
