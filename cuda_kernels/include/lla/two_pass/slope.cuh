#pragma once
// The slope of a row, (C_kk + ridge I) u = q - kbar: by conjugate gradients on the moments in registers.

#include "lla/two_pass/shape.cuh"
#include "lla/steps.cuh"

__device__ __forceinline__ float mean_of(const Shared& shared, int column) { return shared.mean[column]; }
__device__ __forceinline__ Entries right_side(Shared& shared, int lane) { return right_side_alone(shared, lane); }

// As conjugate gradients take them.
__device__ __forceinline__ void pair_lanes(float (&c)[ROW_BLOCKS][D / 2]) {
#pragma unroll
  for (int b = 0; b < ROW_BLOCKS; b++) pair_lanes(c[b], thread_index() % 32, false);
}

// By steps, whether they came near enough to the slope; every warp has all of it then. What they found is put into the system once: in
// float32 the residual of the recurrences may drift from the true one. Then the row is factored: with steps that begin anew, all rows of
// 512 keys took 3 % longer (on an H200).
__device__ __forceinline__ bool solve_by_steps(Shared& shared, const lla::Call& call, const float (&c)[ROW_BLOCKS][D / 2], float ridge, Entries& x) {
  const int thread = thread_index(), lane = thread % 32;
  const Exchange exchange(shared, call);
  LyingVector& vector = shared.solving.vectors[thread / 32];
  Iterate at(right_side(shared, lane), ridge);
  int number = 1;
  if (!take_steps_alone(shared, exchange, c[0], ridge, thread, at, number)) return false;
  x = at.x;
  __syncwarp();
  entries_of_lane(vector, lane) = x;
  __syncwarp();
  const Entries product = gather_rows(shared, thread, number, multiply_rows_of_warp<false>(vector, c[0], thread).of);
  return is_near(at, residual_of(right_side(shared, lane), ridge, x, product), at.r, ridge);
}
