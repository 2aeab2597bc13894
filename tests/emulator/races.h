#pragma once
// Whether accesses to shared memory are ordered: of two to the same two bytes, one of them a write, one must happen
// before the other by barriers, whatever order the fibers ran in. Vector clocks; the compiler tells of every access
// (-fsanitize=thread, with the functions of races.cpp in place of its library).

#include <cstddef>
#include <string>
#include <vector>

namespace races {

// Up to which time of each thread all is known to have happened; of those before `first` and beyond the last, nothing.
struct Clock {
  int first = 0;
  std::vector<unsigned> times;
  unsigned of(int thread) const {
    const size_t i = thread - first;
    return i < times.size() ? times[i] : 0;
  }
  void join(const Clock& other);
};

constexpr size_t ALIGNMENT = 1024;

// Blocks that run at once, of so many threads each; bytes: at most what is watched, every piece of it rounded up.
void begin(int blocks, int threads, size_t bytes);
void end();  // gives back all but what was found
unsigned char* watched(size_t bytes, const std::string& name);  // at a multiple of ALIGNMENT
void run(int thread);

// Barriers by their address. All who arrived in a phase happen before all who pass it.
void arrive(const void* barrier);
void complete(const void* barrier, unsigned phase);
void pass(const void* barrier, unsigned phase);

// What happens later on behalf of a thread as it is now: an asynchronous copy, which a barrier then stands for.
struct Moment {
  int thread;
  Clock clock;
};
Moment now();
void act(const Moment& moment);
void arrive_as(const Moment& moment, const void* barrier);

// The first conflict, or nothing.
std::string conflict();

}  // namespace races
