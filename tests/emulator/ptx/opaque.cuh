#pragma once
inline int thread_index() { return threadIdx.x; }
inline int block_index() { return blockIdx.x; }
inline void make_opaque(unsigned&) {}
template <class T>
inline void make_opaque(T*&) {}
inline float copy_opaque(float x) { return x; }
