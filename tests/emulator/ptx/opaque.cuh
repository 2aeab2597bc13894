#pragma once
inline int thread_index() { return threadIdx.x; }
inline int block_index() { return blockIdx.x; }
inline void make_opaque(unsigned&) {}
template <class T>
const T* advanced(const T* from, int stride_bytes, int count) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + static_cast<long long>(stride_bytes) * count);
}
