#include "races.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <malloc.h>
#include <map>
#include <memory>

namespace races {
namespace {

struct Cell {
  int writer = -1, reader = -1;
  unsigned written = 0, read = 0;
  std::unique_ptr<Clock> readers;  // where there are several
};

struct Region {
  uintptr_t first, end;
  std::string name;
  std::vector<Cell> cells;  // of two bytes
};

struct Barrier {
  Clock open, done[2];
};

struct State {
  std::vector<Region> regions;
  std::vector<Clock> clocks;
  std::map<const void*, Barrier> barriers;
  std::string found;
};

// Accesses are told before any of this is there, and until the process is gone: it is made once and never destroyed.
State* state = nullptr;
int current = 0;
const Clock* clock_of_current;

void join(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

void tell(const Region& region, uintptr_t at, const char* what, int other) {
  if (!state->found.empty()) return;
  char text[200];
  snprintf(text, sizeof text, "race: %s, byte %zu: %s by threads %d and %d", region.name.c_str(), size_t(at - region.first), what, other, current);
  state->found = text;
}

void access(uintptr_t address, size_t bytes, bool writes) {
  if (!state) return;
  for (Region& region : state->regions) {
    if (address < region.first || address >= region.end) continue;
    const Clock& clock = *clock_of_current;
    for (uintptr_t at = address; at < address + bytes; at += 2) {
      Cell& cell = region.cells[(at - region.first) / 2];
      if (cell.writer >= 0 && clock[cell.writer] < cell.written) tell(region, at, writes ? "two writes" : "a write and a read", cell.writer);
      if (!writes) {
        if (cell.readers)
          (*cell.readers)[current] = clock[current];
        else if (cell.reader < 0 || cell.reader == current)
          cell.reader = current, cell.read = clock[current];
        else {
          cell.readers = std::make_unique<Clock>(clock.size());
          (*cell.readers)[cell.reader] = cell.read, (*cell.readers)[current] = clock[current];
        }
        continue;
      }
      if (cell.readers) {
        for (size_t i = 0; i < clock.size(); i++)
          if (clock[i] < (*cell.readers)[i]) tell(region, at, "a read and a write", i);
      } else if (cell.reader >= 0 && clock[cell.reader] < cell.read)
        tell(region, at, "a read and a write", cell.reader);
      cell.readers.reset(), cell.reader = -1;
      cell.writer = current, cell.written = clock[current];
    }
    return;
  }
}

}  // namespace

void begin(int threads) {
  if (!state) state = new State;
  state->regions.clear(), state->barriers.clear(), state->found.clear();
  state->clocks.assign(threads, Clock(threads));
  for (int i = 0; i < threads; i++) state->clocks[i][i] = 1;
  run(0);
}

// Readers' clocks are gigabytes where many blocks run at once, and every kernel is a library with a state of its own.
void end() {
  state->regions.clear(), state->barriers.clear(), state->clocks.clear();
  malloc_trim(0);
}

void watch(const void* memory, size_t bytes, const std::string& name) {
  Region& region = state->regions.emplace_back();
  region.first = reinterpret_cast<uintptr_t>(memory), region.end = region.first + bytes, region.name = name;
  region.cells.resize(bytes / 2 + 1);
}

void run(int thread) { current = thread, clock_of_current = &state->clocks[thread]; }

void arrive(const void* barrier) {
  join(state->barriers[barrier].open, state->clocks[current]);
  state->clocks[current][current]++;
}
void complete(const void* barrier, unsigned phase) {
  Barrier& b = state->barriers[barrier];
  b.done[phase % 2] = std::move(b.open);
  b.open.clear();
}
void pass(const void* barrier, unsigned phase) { join(state->clocks[current], state->barriers[barrier].done[phase % 2]); }

Moment now() {
  const Moment moment{current, state->clocks[current]};
  state->clocks[current][current]++;
  return moment;
}
void act(const Moment& moment) { current = moment.thread, clock_of_current = &moment.clock; }
void arrive_as(const Moment& moment, const void* barrier) { join(state->barriers[barrier].open, moment.clock); }

std::string conflict() { return state->found; }

}  // namespace races

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESSES(bytes)                                                                              \
  void __tsan_read##bytes(void* p) { races::access(reinterpret_cast<uintptr_t>(p), bytes, false); }  \
  void __tsan_write##bytes(void* p) { races::access(reinterpret_cast<uintptr_t>(p), bytes, true); }
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES
#define ACCESSES(bytes)                                                                                        \
  void __tsan_unaligned_read##bytes(void* p) { races::access(reinterpret_cast<uintptr_t>(p), bytes, false); }  \
  void __tsan_unaligned_write##bytes(void* p) { races::access(reinterpret_cast<uintptr_t>(p), bytes, true); }
ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
#undef ACCESSES
void __tsan_read_range(void* p, unsigned long bytes) { races::access(reinterpret_cast<uintptr_t>(p), bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { races::access(reinterpret_cast<uintptr_t>(p), bytes, true); }
}
