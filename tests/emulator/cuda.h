#pragma once
// CUDA C++ on the host: a thread of a block is a fiber, and the blocks of a cluster run at once.
//
// The order in which fibers go on is a parameter, forward, backward or random, and so is when asynchronous copies and
// products take effect, as early or as late as they may: a missing barrier or wait shows as a wrong number or as a
// deadlock, which ends the launch with a message. Headers of the same names stand in for those of include/ptx.

#include <setjmp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "races.h"

#define NOT_WATCHED __attribute__((noinline, no_sanitize_thread))
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __builtin_assume(x)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK = 256 << 10;
constexpr int BLOCK_BARRIER = 0;
constexpr size_t VARIABLES = 64 << 10;  // no fewer bytes than a block's variables take

// Goes on when all have come; `phase` counts how often that was.
struct Barrier {
  int count = 0;
  unsigned phase = 0;
  bool any[2] = {};  // whether one gave true, by the phase's parity
};

struct MemoryBarrier {
  int expected = 0, missing = 0;
  long bytes = 0;
  unsigned phase = 0;
  bool valid = false;
};

// What a fiber waits for: a word that is not `value`, in its lowest bit alone where it is a parity.
struct Wait {
  const unsigned* word = nullptr;
  unsigned value = 0, mask = ~0u;
  bool over() const { return !word || (*word & mask) != value; }
};

struct Warp {
  Barrier barrier, collective;
  bool looks = false;
  // Two collectives' worth: a lane that writes for the next one meets none that still reads the last.
  alignas(16) unsigned char words[2][LANES][64];
};

struct Block {
  unsigned char* shared = nullptr;
  std::map<int, unsigned char*> variables;
  std::map<int, Barrier> barriers;
  std::map<unsigned, MemoryBarrier> memory_barriers;
  std::deque<Warp> warps;
  bool any = false;  // of __syncthreads_or
};

inline bool late;  // whether what is asynchronous happens as late as it may

// A thread's asynchronous work of one kind, which takes effect at once or when its group is waited for.
class Deferred {
 public:
  template <class Action>
  void add(Action action) {
    if (late)
      open_.push_back(action);
    else
      action();
  }
  void commit();
  void wait(int pending);  // until all groups but the last `pending` are done

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

struct Thread {
  Wait wait;
  bool started = false, done = false;
  int block = 0, index = 0;
  unsigned collectives = 0, cluster_phase = 0;
  jmp_buf context;
  Deferred copies, products;
};

struct Dimensions {
  int x, y, z;
};

// Never destroyed: at the process's end nothing is left that could watch it.
inline auto& threads = *new std::deque<Thread>;
inline auto& stacks = *new std::vector<std::unique_ptr<char[]>>;  // of the threads
inline auto& blocks = *new std::deque<Block>;
inline auto& boxes = *new std::vector<std::function<void()>>;  // copies of the copy engine under way
inline Thread* running;
inline jmp_buf scheduler;
inline Dimensions grid, first_block;
inline int threads_of_a_block;
inline std::mt19937 random;
inline auto& failure = *new std::string;
inline auto& kernel = *new std::function<void()>;

Block& block();
Warp& warp();
inline int lane() { return running->index % LANES; }

[[noreturn]] void fail(const std::string& what);
void wait_for(Wait wait);
// Gives way to all others, as one who looks whether something has come. That is no progress of its warp, up to where a lane
// next arrives at a barrier.
void look_again();
void arrive(Barrier& barrier, int count);
void meet(Barrier& barrier, int count);

// What every lane of the warp gives, once all have given it; memory is not ordered by that.
template <class T>
struct Given {
  const unsigned char (*words)[64];
  T of(int lane) const {
    T x;
    memcpy(&x, words[lane], sizeof x);
    return x;
  }
};
const unsigned char (*give(const void* x, size_t bytes))[64];
template <class T>
Given<T> give(const T& x) {
  static_assert(sizeof(T) <= 64);
  return {give(&x, sizeof x)};
}

MemoryBarrier& memory_barrier(Block& of, unsigned address);
void settle(MemoryBarrier& barrier);

// Addresses of shared memory: an offset in the block's own, or beyond WINDOW in that of a block of the cluster.
constexpr unsigned WINDOW = 1u << 24;
unsigned char* at(unsigned address);

// What an instruction takes at once lies at a multiple of its size.
template <class T>
T& whole(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("misaligned: an address that is no multiple of " + std::to_string(sizeof(T)));
  return *p;
}
template <class T>
T& whole_at(unsigned address) { return whole(reinterpret_cast<T*>(at(address))); }

unsigned char* shared_memory(size_t bytes, const char* name);

template <class T>
T& variable(int number) {
  auto& memory = block().variables[number];
  if (!memory) memory = shared_memory(sizeof(T), "a variable");
  return *reinterpret_cast<T*>(memory);
}

// The driver copies arguments, wherever they lie.
template <class T>
T argument(const void* from) {
  T x;
  memcpy(&x, from, sizeof(T));
  return x;
}

// Runs a grid of blocks, `cluster` of them at once. Gives what is wrong, or nothing.
std::string launch(Dimensions size, int block_size, int cluster, int shared_bytes, int order);

template <int (*GET)(int)>
struct Index {
  struct Axis {
    int axis;
    operator unsigned() const { return GET(axis); }
  };
  Axis x{0}, y{1}, z{2};
};
inline int thread_axis(int axis) { return axis ? 0 : running->index; }
inline int block_axis(int axis) { return axis == 0 ? first_block.x + running->block : axis == 1 ? first_block.y : first_block.z; }
inline int grid_axis(int axis) { return axis == 0 ? grid.x : axis == 1 ? grid.y : grid.z; }

}  // namespace emulator

inline emulator::Index<emulator::thread_axis> threadIdx;
inline emulator::Index<emulator::block_axis> blockIdx;
inline emulator::Index<emulator::grid_axis> gridDim;

inline void __syncthreads() { emulator::meet(emulator::block().barriers[emulator::BLOCK_BARRIER], emulator::threads_of_a_block); }
inline bool __syncthreads_or(bool x) {
  bool& any = emulator::block().any;
  __syncthreads();
  any = any || x;
  __syncthreads();
  const bool found = any;
  __syncthreads();
  any = false;
  return found;
}
inline void __syncwarp() { emulator::meet(emulator::warp().barrier, emulator::LANES); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned, T x, int from) { return emulator::give(x).of(from); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) { return emulator::give(x).of(emulator::lane() ^ mask); }
template <class T>
T __shfl_up_sync(unsigned, T x, int offset) { return emulator::give(x).of(max(emulator::lane() - offset, emulator::lane() < offset ? emulator::lane() : 0)); }
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto given = emulator::give(x);
  unsigned all = 0;
  for (int lane = 0; lane < emulator::LANES; lane++) all |= unsigned(given.of(lane)) << lane;
  return all;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == ~0u; }
template <class T>
T __reduce_max_sync(unsigned, T x) {
  const auto given = emulator::give(x);
  for (int lane = 0; lane < emulator::LANES; lane++) x = max(x, given.of(lane));
  return x;
}
// Atomic operations race with none; whether plain accesses to the same word are ordered with them is not looked at.
NOT_WATCHED inline unsigned atomicAdd(unsigned* p, unsigned x) {
  const unsigned before = *p;
  *p += x;
  return before;
}
NOT_WATCHED inline unsigned atomicMax(unsigned* p, unsigned x) {
  const unsigned before = *p;
  if (x > before) *p = x;
  return before;
}
