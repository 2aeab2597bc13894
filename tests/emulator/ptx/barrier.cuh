#pragma once
inline void barrier_sync(int id, int threads) { emulator::meet(emulator::block().barriers[id], threads); }
