#pragma once
// A row's ridge system by conjugate gradients of one block, which has all of the row's moments.

#include "lla/conjugate.cuh"
#include "lla/steps_alone.cuh"

// What steps begin with, and how far the mean of the keys is from their origin; by a thread of the matrix warps for every column, who meet
// before it is read.
__device__ __forceinline__ void leave_right_side(Shared& shared, int column) {
  if (column >= D) return;
  const float shift = shared.sums[column] * inverse_weight(shared.own.d1);
  entry_of_row(shared.solving.right, column) = query_at(shared, column) - (shared.origin[column] + shift);
  entry_of_row(shared.solving.shift, column) = shift;
}

// By the matrix warps, whose accumulators are c: whether the row was solved, and its output written.
__device__ __forceinline__ bool solve_alone(Shared& shared, const lla::Call& call, float ridge, const float (&c)[D]) {
  const int thread = thread_index();
  IterateAlone at(right_side(shared, thread % 32), ridge);
#pragma unroll 1
  for (unsigned number = 1;; number++) {  // of the product
    if (!take_steps_alone(shared, c + D / 2, ridge, thread, at, number)) return false;
    const int column = thread_index() % D;  // anew: kept over the steps it would cost a register
    const Centring centre(shared);
    // What the slope's output is made of comes between what lanes wait for there.
    const TrueResidual residual(shared, c + D / 2, ridge, thread, at, number);
    const int upper = upper_row(thread), lane = thread % 32;
    LyingVector& slope = lying_slope(shared, thread);
    // Of values' moments about the mean: of all rows one number is taken off, times the column's sum.
    const float of_shift = inner_product(entries_of_lane(slope, lane), entries_of_lane(shared.solving.shift, lane));
    multiply_values(shared, c, thread, entry_of_row(slope, upper), entry_of_row(slope, upper + 8));
    meet_matrix_warps();
    // On its way while the residual says whether it is the output: what comes after one that is not takes its place.
    const float mean = IN_TURN ? shared.own.mean[D + column] : mean_of(shared, D + column);
    if (thread < D) output_of_block(shared, call)[column] = narrow<BFLOAT>(mean + centre.inverse_d1 * sum_of_values(shared, centre, column, of_shift));
    if (residual.is_near(at, ridge)) return true;
    // Where rows are taken in turn, what warps gave to the output lies where their vectors go.
    meet_matrix_warps();
    residual.begin_anew(at, ridge);
  }
}
