// What is no kernel's own, compiled once and not watched: how fibers meet and take turns.
#include <ucontext.h>

#include "cuda.h"

namespace emulator {

void Deferred::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}
void Deferred::wait(int pending) {
  for (; int(groups_.size()) > pending; groups_.pop_front())
    for (auto& action : groups_.front()) action();
}

Block& block() { return blocks[running->block]; }
Warp& warp() { return block().warps[running->index / LANES]; }

void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  longjmp(scheduler, 1);
}

void wait_for(Wait wait) {
  if (wait.over()) return;
  running->wait = wait;
  if (!_setjmp(running->context)) longjmp(scheduler, 1);
}

void look_again() {
  warp().looks = true;
  if (!_setjmp(running->context)) longjmp(scheduler, 1);
}

static void count_in(Barrier& barrier, int count) {
  if (++barrier.count == count) barrier.count = 0, barrier.phase++;
}
void arrive(Barrier& barrier, int count) {
  const unsigned phase = barrier.phase;
  warp().looks = false;
  races::arrive(&barrier);
  if (barrier.count + 1 == count) races::complete(&barrier, phase);
  count_in(barrier, count);
}
void meet(Barrier& barrier, int count) {
  const unsigned phase = barrier.phase;
  arrive(barrier, count);
  wait_for({&barrier.phase, phase});
  races::pass(&barrier, phase);
}

const unsigned char (*give(const void* x, size_t bytes))[64] {
  auto& words = warp().words[running->collectives++ % 2];
  memcpy(words[lane()], x, bytes);
  Barrier& barrier = warp().collective;
  const unsigned phase = barrier.phase;
  count_in(barrier, LANES);
  wait_for({&barrier.phase, phase});
  return words;
}

MemoryBarrier& memory_barrier(Block& of, unsigned address) {
  MemoryBarrier& barrier = of.memory_barriers[address];
  if (!barrier.valid) fail("a memory barrier is used that is not initialised");
  return barrier;
}
void settle(MemoryBarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  races::complete(&barrier, barrier.phase);
  barrier.missing = barrier.expected, barrier.phase++;
}

unsigned char* at(unsigned address) {
  return address < WINDOW ? block().shared + address : blocks[address / WINDOW - 1].shared + address % WINDOW;
}

// Shared memory is not cleared.
unsigned char* shared_memory(size_t bytes, const char* name) {
  unsigned char* memory = races::watched(bytes, name);
  for (size_t i = 0; i < bytes; i++) memory[i] = random();
  return memory;
}

namespace {

void enter() {
  kernel();
  running->done = true;
  longjmp(scheduler, 1);
}

// Runs the blocks of one cluster to their end. order: 0 forward, 1 backward, else random.
void run_cluster(int count, int shared_bytes, int order) {
  blocks.clear(), threads.clear(), boxes.clear();
  races::begin(count, threads_of_a_block, count * (shared_bytes + races::ALIGNMENT + VARIABLES));
  for (int b = 0; b < count; b++) {
    Block& block = blocks.emplace_back();
    block.shared = shared_memory(shared_bytes, "dynamic shared memory");
    block.warps.resize((threads_of_a_block + LANES - 1) / LANES);
    for (int i = 0; i < threads_of_a_block; i++) {
      Thread& thread = threads.emplace_back();
      thread.block = b, thread.index = i;
      if (stacks.size() < threads.size()) stacks.emplace_back(new char[STACK]);
    }
  }
  static auto& turn = *new std::vector<Thread*>;
  static bool any, waits, looked;
  static size_t next;
  static int rounds;
  static ucontext_t context;
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
        getcontext(&context);
        context.uc_stack.ss_sp = stacks[thread.block * threads_of_a_block + thread.index].get();
        context.uc_stack.ss_size = STACK;
        makecontext(&context, enter, 0);
        setcontext(&context);
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

}  // namespace

std::string launch(Dimensions size, int block_size, int cluster, int shared_bytes, int order) {
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
  blocks.clear(), threads.clear(), stacks.clear();
  races::end();
  return failure;
}

}  // namespace emulator
