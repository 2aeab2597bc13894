#pragma once
inline void barrier_sync(int id, int threads) { emulator::meet(emulator::block().barriers[id], threads); }
inline bool barrier_any(int id, int threads, bool x) {
  emulator::Barrier& barrier = emulator::block().barriers[id];
  // Of two phases in turn: one is asked for again only when all have read the answer.
  bool& any = barrier.any[barrier.phase % 2];
  any = x || (barrier.count > 0 && any);
  emulator::meet(barrier, threads);
  return any;
}
