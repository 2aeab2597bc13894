#pragma once
// Of a grid's blocks the second half are beside those of the first.
inline unsigned multiprocessor() { return blockIdx.x % ((gridDim.x + 1) / 2); }
inline unsigned place_on_multiprocessor(int) { return blockIdx.x / ((gridDim.x + 1) / 2); }
