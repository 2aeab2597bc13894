// Attention of a few query rows on Hopper and later: keys and values by the copy engine, products by the matrix units.

#define BOXES 1
#define ALIGNED 1
#include "attend.cuh"

static_assert(!FLOAT, "float32 goes without matrix units, and through the portable kernel");

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS)
    attend_kernel(const __grid_constant__ Problem p, const __grid_constant__ Maps maps) {
  attend(p, &maps);
}
