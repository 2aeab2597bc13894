#pragma once
// A warp, or a warpgroup, arrives at a barrier in shared memory by one of its threads, the first. Where the kernel is compiled
// FOR_RACECHECK, a tool of compute-sanitizer, by all: it follows threads, and does not see that one speaks for all.

#ifdef FOR_RACECHECK
constexpr int OF_WARP = 32, OF_WARPGROUP = 128;
#else
constexpr int OF_WARP = 1, OF_WARPGROUP = 1;
#endif
