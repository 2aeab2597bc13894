#include "races.h"

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <malloc.h>
#include <map>
#include <memory>

namespace races {
namespace {

// Of a thread, at a time of its own; times begin at 1, so that what is zero is before all.
struct Access {
  int thread;
  unsigned time;
  bool operator==(const Access&) const = default;
};

// Reads since the last write: the latest, and of those before it all that may be unordered with it.
struct Cell {
  Access written, read;
  std::vector<Access> reads;
};

struct Barrier {
  Clock open, done[2];
};

struct State {
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Cell> cells;  // of two bytes
  std::map<size_t, std::string> names;  // of what begins there
  std::vector<Clock> clocks;
  std::map<const void*, Barrier> barriers;
  std::string found;
};

// Accesses are told before any of this is there, and until the process is gone: it is made once and never destroyed.
State* state = nullptr;
uintptr_t first;
size_t size = 0;
Access current;
const Clock* clock_of_current;

void tell(size_t at, const char* what, int other) {
  if (!state->found.empty()) return;
  const auto& [start, name] = *--state->names.upper_bound(at);
  char text[200];
  snprintf(text, sizeof text, "race: %s, byte %zu: %s by threads %d and %d", name.c_str(), at - start, what, other, current.thread);
  state->found = text;
}

size_t rounded(size_t x) { return (x + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// The current thread's next accesses are of another time.
void advance() {
  Clock& clock = state->clocks[current.thread];
  current.time = ++clock.times[current.thread - clock.first];
}

bool ordered(const Access& before) { return clock_of_current->of(before.thread) >= before.time; }

void read(Cell& cell, size_t at) {
  if (cell.read == current) return;
  if (!ordered(cell.written)) tell(at, "a write and a read", cell.written.thread);
  // Whoever comes after this read comes after what it comes after.
  if (!ordered(cell.read)) {
    if (cell.reads.size() == cell.reads.capacity()) {
      std::erase_if(cell.reads, ordered);
      if (2 * cell.reads.size() > cell.reads.capacity()) cell.reads.reserve(2 * cell.reads.capacity());
    }
    cell.reads.push_back(cell.read);
  }
  cell.read = current;
}

void write(Cell& cell, size_t at) {
  if (!ordered(cell.written)) tell(at, "two writes", cell.written.thread);
  if (!ordered(cell.read)) tell(at, "a read and a write", cell.read.thread);
  for (const Access& read : cell.reads)
    if (!ordered(read)) tell(at, "a read and a write", read.thread);
  cell.written = current, cell.read = {}, cell.reads.clear();
}

template <bool WRITES>
inline void access(const void* p, size_t bytes) {
  const size_t at = reinterpret_cast<uintptr_t>(p) - first;
  if (at >= size) return;
  for (size_t i = at / 2; 2 * i < std::min(at + bytes, size); i++)
    WRITES ? write(state->cells[i], 2 * i) : read(state->cells[i], 2 * i);
}

}  // namespace

void Clock::join(const Clock& other) {
  if (times.empty()) first = other.first;
  if (other.first < first) times.insert(times.begin(), first - other.first, 0), first = other.first;
  const size_t from = other.first - first, count = other.times.size();
  if (times.size() < from + count) times.resize(from + count);
  for (size_t i = 0; i < count; i++) times[from + i] = std::max(times[from + i], other.times[i]);
}

void begin(int blocks, int threads, size_t bytes) {
  if (!state) state = new State;
  state->barriers.clear(), state->names.clear(), state->found.clear(), state->cells.clear(), state->clocks.clear();
  state->memory.reset(new unsigned char[bytes + ALIGNMENT]);
  state->cells.reserve(bytes / 2);
  first = rounded(reinterpret_cast<uintptr_t>(state->memory.get())), size = 0;
  for (int i = 0; i < blocks * threads; i++) {
    Clock& clock = state->clocks.emplace_back();
    clock.first = i / threads * threads, clock.times.resize(threads);
    clock.times[i % threads] = 1;
  }
  run(0);
}

unsigned char* watched(size_t bytes, const std::string& name) {
  unsigned char* memory = reinterpret_cast<unsigned char*>(first + size);
  state->names[size] = name;
  size += rounded(bytes);
  assert(size / 2 <= state->cells.capacity());
  state->cells.resize(size / 2);
  return memory;
}

// Readers are many where many blocks run at once, and every kernel is a library with a state of its own.
void end() {
  size = 0;
  *state = {.found = state->found};
  malloc_trim(0);
}

void run(int thread) {
  clock_of_current = &state->clocks[thread];
  current = {thread, clock_of_current->of(thread)};
}

void arrive(const void* barrier) {
  state->barriers[barrier].open.join(*clock_of_current);
  advance();
}
void complete(const void* barrier, unsigned phase) {
  Barrier& b = state->barriers[barrier];
  std::swap(b.done[phase % 2], b.open);
  b.open.times.clear();
}
void pass(const void* barrier, unsigned phase) { state->clocks[current.thread].join(state->barriers[barrier].done[phase % 2]); }

Moment now() {
  const Moment moment{current.thread, state->clocks[current.thread]};
  advance();
  return moment;
}
void act(const Moment& moment) {
  clock_of_current = &moment.clock;
  current = {moment.thread, moment.clock.of(moment.thread)};
}
void arrive_as(const Moment& moment, const void* barrier) { state->barriers[barrier].open.join(moment.clock); }

std::string conflict() { return state->found; }

}  // namespace races

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESSES(bytes)                                                                              \
  void __tsan_read##bytes(void* p) { races::access<false>(p, bytes); }  \
  void __tsan_write##bytes(void* p) { races::access<true>(p, bytes); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES
#define ACCESSES(bytes)                                                                                        \
  void __tsan_unaligned_read##bytes(void* p) { races::access<false>(p, bytes); }  \
  void __tsan_unaligned_write##bytes(void* p) { races::access<true>(p, bytes); }
ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES
void __tsan_read_range(void* p, unsigned long bytes) { races::access<false>(p, bytes); }
void __tsan_write_range(void* p, unsigned long bytes) { races::access<true>(p, bytes); }
}
