#pragma once
// Whether accesses to shared memory are ordered: of two to the same two bytes, one of them a write, one must happen
// before the other by barriers, whatever order the fibers ran in. Vector clocks; the compiler tells of every access
// (-fsanitize=thread, with the functions of races.cpp in place of its library).

#include <cstddef>
#include <string>
#include <vector>

namespace races {

typedef std::vector<unsigned> Clock;

// Nothing is watched until `watch`; threads: of a cluster.
void begin(int threads);
void end();  // gives back all but what was found
void watch(const void* memory, size_t bytes, const std::string& name);
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
