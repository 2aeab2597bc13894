#pragma once
inline void mbarrier_init(unsigned barrier, int arrivals) {
  emulator::MemoryBarrier& b = emulator::block().memory_barriers[barrier];
  if (b.valid) emulator::fail("a memory barrier is initialised while it is in use");
  b = {arrivals, arrivals, 0, 0, true};
}
inline void mbarrier_invalidate(unsigned barrier) { emulator::memory_barrier(emulator::block(), barrier).valid = false; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect(unsigned barrier, unsigned bytes) {
  emulator::MemoryBarrier& b = emulator::memory_barrier(emulator::block(), barrier);
  b.bytes += bytes, b.missing--;
  emulator::warp().looks = false;
  races::arrive(&b);
  emulator::settle(b);
}
inline void mbarrier_arrive(unsigned barrier) { mbarrier_arrive_expect(barrier, 0); }
inline unsigned mbarrier_arrive_counted(unsigned barrier) {
  const unsigned before = emulator::memory_barrier(emulator::block(), barrier).missing;
  mbarrier_arrive(barrier);
  return before;
}
inline void mbarrier_wait(unsigned barrier, unsigned parity) {
  const emulator::MemoryBarrier& b = emulator::memory_barrier(emulator::block(), barrier);
  emulator::wait_for({&b.phase, parity, 1});
  races::pass(&b, parity);
}
