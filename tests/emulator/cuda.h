#pragma once
// CUDA C++ on the host: a thread of a block is a fiber, and the blocks of a cluster run at once.
//
// The order in which fibers go on is a parameter, forward, backward or random, and so is when asynchronous copies and
// products take effect, as early or as late as they may: a missing barrier or wait shows as a wrong number or as a
// deadlock, which ends the launch with a message. Headers of the same names stand in for those of include/ptx.

#include <setjmp.h>
#include <ucontext.h>

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
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::map<int, std::unique_ptr<unsigned char[]>> variables;
  std::map<int, Barrier> barriers;
  std::map<unsigned, MemoryBarrier> memory_barriers;
  std::deque<Warp> warps;
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
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  // Until all groups but the last `pending` are done.
  void wait(int pending) {
    for (; int(groups_.size()) > pending; groups_.pop_front())
      for (auto& action : groups_.front()) action();
  }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

struct Thread {
  ucontext_t first;
  jmp_buf context;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
  int block = 0, index = 0;
  unsigned collectives = 0;
  Wait wait;
  Deferred copies, products;
};

struct Dimensions {
  int x, y, z;
};

// Never destroyed: at the process's end nothing is left that could watch it.
inline auto& threads = *new std::deque<Thread>;
inline auto& blocks = *new std::deque<Block>;
inline auto& boxes = *new std::vector<std::function<void()>>;  // copies of the copy engine under way
inline Thread* running;
inline jmp_buf scheduler;
inline Dimensions grid, first_block;
inline int threads_of_a_block;
inline std::mt19937 random;
inline auto& failure = *new std::string;
inline auto& kernel = *new std::function<void()>;

inline Block& block() { return blocks[running->block]; }
inline Warp& warp() { return block().warps[running->index / LANES]; }
inline int lane() { return running->index % LANES; }

inline void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  longjmp(scheduler, 1);
}

inline void wait_for(Wait wait) {
  if (wait.over()) return;
  running->wait = wait;
  if (!_setjmp(running->context)) longjmp(scheduler, 1);
}

// Gives way to all others, as one who looks whether something has come. That is no progress of its warp, up to where a lane
// next arrives at a barrier.
inline void look_again() {
  warp().looks = true;
  if (!_setjmp(running->context)) longjmp(scheduler, 1);
}

inline void count_in(Barrier& barrier, int count) {
  if (++barrier.count == count) barrier.count = 0, barrier.phase++;
}
inline void arrive(Barrier& barrier, int count) {
  const unsigned phase = barrier.phase;
  warp().looks = false;
  races::arrive(&barrier);
  if (barrier.count + 1 == count) races::complete(&barrier, phase);
  count_in(barrier, count);
}
inline void meet(Barrier& barrier, int count) {
  const unsigned phase = barrier.phase;
  arrive(barrier, count);
  wait_for({&barrier.phase, phase});
  races::pass(&barrier, phase);
}

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
template <class T>
Given<T> give(const T& x) {
  static_assert(sizeof(T) <= 64);
  auto& words = warp().words[running->collectives++ % 2];
  memcpy(words[lane()], &x, sizeof x);
  Barrier& barrier = warp().collective;
  const unsigned phase = barrier.phase;
  count_in(barrier, LANES);
  wait_for({&barrier.phase, phase});
  return {words};
}

inline MemoryBarrier& memory_barrier(Block& of, unsigned address) {
  MemoryBarrier& barrier = of.memory_barriers[address];
  if (!barrier.valid) fail("a memory barrier is used that is not initialised");
  return barrier;
}
inline void settle(MemoryBarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  races::complete(&barrier, barrier.phase);
  barrier.missing = barrier.expected, barrier.phase++;
}

// Addresses of shared memory: an offset in the block's own, or beyond WINDOW in that of a block of the cluster.
constexpr unsigned WINDOW = 1u << 24;
inline unsigned char* at(unsigned address) {
  return address < WINDOW ? block().shared + address : blocks[address / WINDOW - 1].shared + address % WINDOW;
}

// What an instruction takes at once lies at a multiple of its size.
template <class T>
T& whole(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("misaligned: an address that is no multiple of " + std::to_string(sizeof(T)));
  return *p;
}
template <class T>
T& whole_at(unsigned address) { return whole(reinterpret_cast<T*>(at(address))); }

template <class T>
T& variable(int number) {
  auto& memory = block().variables[number];
  if (!memory) {
    memory.reset(new unsigned char[sizeof(T)]);
    if (number >= 0) races::watch(memory.get(), sizeof(T), "a variable");
  }
  return *reinterpret_cast<T*>(memory.get());
}

// The driver copies arguments, wherever they lie.
template <class T>
T argument(const void* from) {
  T x;
  memcpy(&x, from, sizeof(T));
  return x;
}

inline void enter() {
  kernel();
  running->done = true;
  longjmp(scheduler, 1);
}

// Runs the blocks of one cluster to their end. order: 0 forward, 1 backward, else random.
inline void run_cluster(int count, int shared_bytes, int order) {
  blocks.clear(), threads.clear(), boxes.clear();
  races::begin(count * threads_of_a_block);
  for (int b = 0; b < count; b++) {
    Block& block = blocks.emplace_back();
    block.memory.resize(shared_bytes + 1024);
    for (auto& byte : block.memory) byte = random();
    block.shared = block.memory.data() + (-reinterpret_cast<uintptr_t>(block.memory.data()) & 1023);
    races::watch(block.shared, shared_bytes, "dynamic shared memory");
    block.warps.resize((threads_of_a_block + LANES - 1) / LANES);
    for (int i = 0; i < threads_of_a_block; i++) {
      Thread& thread = threads.emplace_back();
      thread.block = b, thread.index = i;
      thread.stack.reset(new char[STACK]);
      getcontext(&thread.first);
      thread.first.uc_stack.ss_sp = thread.stack.get();
      thread.first.uc_stack.ss_size = STACK;
      thread.first.uc_link = nullptr;
      makecontext(&thread.first, enter, 0);
    }
  }
  static auto& turn = *new std::vector<Thread*>;
  static bool any, waits, looked;
  static size_t next;
  static int rounds;
  rounds = 0;
  turn.clear();
  for (Thread& thread : threads) turn.push_back(&thread);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  while (failure.empty()) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    any = waits = looked = false;
    for (next = 0; next < turn.size() && failure.empty(); next++) {
      Thread& thread = *turn[next];
      if (thread.done) continue;
      waits = true;
      if (!thread.wait.over()) continue;
      thread.wait = {};
      running = &thread;
      races::run(thread.block * threads_of_a_block + thread.index);
      if (!_setjmp(scheduler)) {
        if (thread.started) longjmp(thread.context, 1);
        thread.started = true;
        setcontext(&thread.first);
      }
      (blocks[thread.block].warps[thread.index / LANES].looks ? looked : any) = true;
    }
    if (failure.empty()) failure = races::conflict();
    if (!waits) break;
    if (!boxes.empty() && (!any || !late)) {
      auto arrived = std::move(boxes);
      boxes.clear();
      if (order > 1) std::shuffle(arrived.begin(), arrived.end(), random);
      for (auto& copy : arrived) copy();
      any = true;
    }
    rounds = any ? 0 : rounds + 1;
    if (!any && failure.empty() && (!looked || rounds > 10000)) failure = "deadlock: every thread waits";
  }
}

inline std::string launch(Dimensions size, int block_size, int cluster, int shared_bytes, int order) {
  grid = size, threads_of_a_block = block_size, late = order % 2 == 0, failure.clear(), random.seed(order);
  std::vector<Dimensions> first;
  for (int z = 0; z < size.z; z++)
    for (int y = 0; y < size.y; y++)
      for (int x = 0; x < size.x; x += cluster) first.push_back({x, y, z});
  if (order == 1) std::reverse(first.begin(), first.end());
  if (order > 1) std::shuffle(first.begin(), first.end(), random);
  for (const Dimensions& block : first) {
    first_block = block;
    run_cluster(cluster, shared_bytes, order);
    if (!failure.empty()) break;
  }
  blocks.clear(), threads.clear();
  races::end();
  return failure;
}

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
#define NOT_WATCHED __attribute__((noinline, no_sanitize_thread))
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
