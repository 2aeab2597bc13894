// Attention on every GPU from sm_80 on, for every layout, head size and element type.

#define BOXES 0
#define CLUSTER 1
#define TOGETHER 0
#define WARPGROUPS 0
#define MOST_ITEMS 1
#define BOX 16
#define READ_ONCE 0
#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_kernel(const __grid_constant__ Problem p) {
  attend(p, nullptr);
}
