#pragma once
// The slope of a row, (C_kk + ridge I) u = q - kbar: by conjugate gradients on the moments in registers.

#include "lla/two_pass/shape.cuh"
#include "lla/steps_alone.cuh"

// As conjugate gradients take them.
__device__ __forceinline__ void pair_lanes(float (&c)[ROW_BLOCKS][D / 2]) {
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++) pair_lanes(c[b], thread_index() % 32, false);
}

// By steps, whether they came near enough to the slope; every warp has all of it then. Else the row is factored: with steps that begin
// anew, all rows of 512 keys took 3 % longer (on an H200).
__device__ __forceinline__ bool solve_by_steps(Shared& shared, const float (&c)[ROW_BLOCKS][D / 2], float ridge, Entries& x) {
  const int thread = thread_index();
  IterateAlone at(right_side(shared, thread % 32), ridge);
#pragma unroll 1
  for (unsigned number = 1;; number++) {  // of the product
    if (!take_steps_alone(shared, c[0], ridge, thread, at, number)) return false;
    x = at.x;
    if (TrueResidual(shared, c[0], ridge, thread, at, number).is_near(at, ridge)) return true;
    if (!at.is_foreseen) return false;
  }
}
