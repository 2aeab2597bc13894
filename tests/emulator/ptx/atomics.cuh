#pragma once
inline unsigned count_one(unsigned* counter) { return atomicAdd(counter, 1); }
