#pragma once
inline void barrier_sync(int id, int threads) { emulator::meet(emulator::block().barriers[id], threads); }
inline void barrier_arrive(int id, int threads) { emulator::arrive(emulator::block().barriers[id], threads); }
